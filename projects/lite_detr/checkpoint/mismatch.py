"""What to say about weights that do not fit a model."""

from collections.abc import Mapping

from .facts import Facts, read_facts
from .suggest import suggest_configs

Shapes = Mapping[str, tuple[int, ...]]


def describe_mismatch(
    source: str,
    left: list[str],
    missing: list[str],
    misshapen: list[str],
    theirs: Shapes,
    mine: Shapes,
) -> str:
    """One line that says how weights and model differ, and which config would fit.

    Args:
        source: the implementation that the weights are of.
        left: the file's keys that nothing in the model corresponds to.
        missing: the model's names that nothing in the file corresponds to.
        misshapen: our names of weights whose shapes differ.
        theirs, mine: the shapes of the file's weights and of the model's, by our names.
    """
    facts, wanted = read_facts(theirs), read_facts(mine)
    differences = facts.differences(wanted) if facts and wanted else {}
    parts = [
        f"{field.replace('_', ' ')} {given} in the weights and {expected} in the model"
        for field, (given, expected) in differences.items()
    ]
    parts += [
        f"{len(names)} keys {what} such as {names[0]}"
        for what, names in (("left over", left), ("missing", missing))
        if names
    ]
    if misshapen:
        name = misshapen[0]
        parts.append(
            f"{len(misshapen)} of another shape such as {name}, {theirs[name]} for {mine[name]}"
        )
    message = f"weights of {source} do not fit the model: {'; '.join(parts)}"
    return f"{message}. {advice(facts)}" if differences else message


def advice(facts: Facts) -> str:
    """The configs to take instead."""
    configs = suggest_configs(facts)
    if not configs:
        return "No config of the model zoo fits them"
    fitting = f"They fit {' or '.join(configs)}"
    if "blocks" in facts.encoder:
        # H3L1 and H2L2 have the same weights.
        fitting += "; which scales are high-level is not in the weights, but in a release's name"
    return fitting
