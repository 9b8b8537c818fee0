"""Describe this machine and installation: versions, compilers, GPUs, and the native operators."""

from collections.abc import Sequence

from .. import cli, collect_env


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    cli.make_parser(__doc__).parse_args(argv)
    print(collect_env.collect_env_info())
