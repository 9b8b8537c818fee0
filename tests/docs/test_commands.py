"""Every command of the docs: what it names exists, and what a machine like this can run is run."""

import re
import shutil

import pytest
from page_commands import (
    Block,
    Command,
    CommandError,
    ShellError,
    all_pages,
    blocks,
    check,
    code_spans,
    commands,
    recipe,
)
from page_runs import BEFORE, EXEMPT, Sandbox, reason_not_to_run
from programs import ROOT

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in all_pages()}

# What a block may need that a CPU machine without a network and COCO lacks; N is a number.
NEEDS = (
    "COCO",
    "a GPU",
    "N GPUs",
    "N GPUs each",
    "N machines",
    "Slurm",
    "nvcc",
    "a network",
    "a browser",
    "a video",
    "the authors' release",
    "OpenVINO",
    "TensorRT",
    "LVIS",
    "SAHI",
    "trackers",
    "make demo",
)
# What it may need that shrunk runs do not.
TIME = ("a minute", "N minutes", "an hour", "N hours", "N days")
# Where commands hide from this test.
COMMAND = re.compile(r"\s*(\$ |python |make |pip |tools/\w+\.(py|sh) )")
INLINE = re.compile(r"([A-Z_]+=\S* )*(python|make|pip|torchrun) \S.*")


def title_problem(title: str) -> str:
    """Return what is wrong with a block's title; empty if nothing is."""
    if not re.match(r"needs?\b", title, re.IGNORECASE):
        return ""
    unknown = [need for need in needs(title) if need not in NEEDS]
    return f"{', '.join(unknown)} is not of {', '.join(NEEDS + TIME)}" if unknown else ""


def needs(title: str) -> list[str]:
    """Return what a block needs except for time, with N for numbers."""
    found = re.split(r", | and ", re.sub(r"\b\d+\b", "N", title.removeprefix("needs ")))
    return [need for need in found if need not in TIME]


def runs_here(block: Block) -> bool:
    return not (block.title.startswith("needs ") and needs(block.title))


def page_problems(page: list[Block], folder) -> list[str]:
    """Return a line for each mistake in a page's commands, with the page's line."""
    found = []
    for block in page:
        if problem := title_problem(block.title):
            found.append(f"{block.line}: {problem}")
        if block.language in ("", "console", "sh", "shell", "text") and COMMAND.match(block.text):
            found.append(f"{block.line}: a block with commands must say bash")
    try:
        given = commands(page, folder)
    except ShellError as error:
        return [*found, str(error)]
    for command in given:
        try:
            check(command.arguments)
        except CommandError as error:
            found.append(f"{command.line}: {command}: {error}")
    return found


def inline(text: str) -> list[Block]:
    """Return the commands in a page's text, each as a block on its line."""
    found = [(span, line) for span, line in code_spans(text) if INLINE.fullmatch(span)]
    lines = dict.fromkeys(line for _, line in found)
    return [
        Block("bash", "", "; ".join(span for span, at in found if at == line), line - 1)
        for line in lines
    ]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("part", [blocks, inline])
def test_what_the_commands_of_a_page_name_exists(name, part, tmp_path):
    problems = page_problems(part(PAGES[name]), tmp_path)
    assert not problems, "\n".join([name, *problems])


def shell(text: str, folder) -> list[Command]:
    return commands([Block("bash", "", text, 1)], folder)


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    # Read when Detectron2 is imported; none of the reader's own datasets is there.
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "repository"
    folder.mkdir()
    yield Sandbox(folder)
    # Of half a gigabyte and more, with the weights of a training.
    shutil.rmtree(folder)


def run_all(name: str, given: list[Command], sandbox: Sandbox) -> None:
    for command in given:
        if reason_not_to_run(command):
            continue
        status, output = sandbox.run(command)
        assert status == 0, f"{name}:{command.line}: {command}\n{output[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if "```bash" in PAGES[name]])
def test_the_commands_of_a_page_run(name, tmp_path, sandbox):
    """Those of blocks that need no more than this machine has, in order."""
    given = commands([block for block in blocks(PAGES[name]) if runs_here(block)], tmp_path)
    before = shell(BEFORE.get(name, ""), tmp_path)
    run_all(name, before + given, sandbox)


@pytest.mark.slow
def test_the_commands_of_make_demo_run(tmp_path, sandbox):
    run_all("Makefile", shell(recipe("demo").stdout, tmp_path), sandbox)


@pytest.mark.slow
def test_a_command_that_fails_is_told(sandbox):
    command = Command(("python", "tools/plot_metrics.py", "no_such_file.json"), 7)
    with pytest.raises(AssertionError, match="README.md:7: .*\n.*no_such_file.json is not a file"):
        run_all("README.md", [command], sandbox)


def test_every_exemption_is_of_a_command_of_the_docs(tmp_path):
    given = set()
    for i, page in enumerate(PAGES.values()):
        (tmp_path / str(i)).mkdir()
        given |= {reason_not_to_run(c) for c in commands(blocks(page), tmp_path / str(i))}
    assert given - {""} == set(EXEMPT.values())


ZOO = "dino/lite_dino_r50_h3l1_2p1x3_36ep.py"
BENCHMARK = "tools/benchmarks/detectors.py"
TRAIN = f"python train_net.py --config-file {ZOO}"

WRONG = {
    "pyton train_net.py": "there is no program pyton",
    "python tools/train.py": "there is no such file",
    "python -m lite_detr.evaluate": "there is no module lite_detr.evaluate",
    "tools/sample.py --seed 1": "No such file or directory",
    "OMP_NUM_THREADS=1 taskset 1 python train_net.py": "taskset takes -c CORES COMMAND",
    f"python train_net.py --nodes 2 --config-file {ZOO}": "unrecognized arguments: --nodes",
    "lite-detr trian": "invalid choice: 'trian'",
    f"lite-detr evaluate --config-file {ZOO} x.y=1": "has no key x.y",
    "python train_net.py --config-file dino/lite_dino_r51.py": "or dino/lite_dino_r50",
    f"{TRAIN} --num-gpus many": "given many, accepted are whole numbers",
    f"{TRAIN} train.max_iters=9": "the config has no key train.max_iters",
    f"{TRAIN} train.max_iter=long": "train.max_iter takes a whole number, got long",
    f"{TRAIN} model.encoder.layer.attention._target_=lite_detr.Plain": "is no lite_detr.Plain",
    f"{TRAIN} dataloader.train.mapper.augmentations.7.prob=1": "has no key dataloader.train",
    "python demo/demo.py --input photos --output out": "arguments are required: --config-file",
    f"python {BENCHMARK} --config-file {ZOO} --tasks sleep": "invalid choice: 'sleep'",
    f"python {BENCHMARK} --compare {ZOO} a.py": "config 'a.py' is neither a file nor",
    "python tools/analyze_model.py dino/dino.py": "config 'dino/dino.py' is neither a file",
    "python tools/kernels/roofline.py --gpu h100": "unrecognized arguments: --gpu",
    "make demos": "No rule to make target 'demos'",
    "make demo EPOCHS=2": "the Makefile has no variable EPOCHS",
    "pip install '.[demos]'": "the package has no extra demos",
    "python -m pytest tests/no_such_test.py": "there are no tests tests/no_such_test.py",
    "python -m pytest -m cuda": "pytest knows no marker cuda",
    "torchrun --nproc_per_nodes 8 train_net.py": "unrecognized arguments: --nproc_per_nodes",
    f"torchrun --nproc_per_node 8 train_net.py --config-file {ZOO} x.y=1": "has no key x.y",
    f"srun --ntasks=8 {TRAIN} x.y=1": "has no key x.y",
    'python "$PROGRAM"': "PROGRAM: unbound variable",
    "python 'train_net.py": "unexpected EOF",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_command_that_names_what_does_not_exist_is_told(text, tmp_path):
    problems = page_problems([Block("bash", "needs COCO", f"{text}\n", 1)], tmp_path)
    assert len(problems) == 1
    assert WRONG[text] in problems[0]


RIGHT = [
    f"A={ZOO}\npython train_net.py --config-file $A \\\n  train.max_iter=9  # short",
    f"{TRAIN} --eval-only train.init_checkpoint=a.pth model.detections_per_image=5 optimizer.lr=1",
    f"{TRAIN} dataloader.train.mapper.augmentations=[] train.amp.enabled=True",
    "python demo/demo.py --config-file digits/dino_efficientnet_lite0.py --input a --output b",
    "tools/benchmarks/operators.py --levels 8x8 4x4 --dtype float32",
    "python tools/kernels/report.py --help",
    "make demo DEMO_OUTPUT=output/other && make test",
    "pip install --no-build-isolation '.[demo,dev]'",
    "python -m pytest tests/demo/test_demo.py::test_a -m 'not gpu' -k forward --collect-only",
    "for i in 1 2; do OMP_NUM_THREADS=$i .venv/bin/python -c 'import torch'; done",
    f"srun --ntasks-per-node=8 torchrun --nproc_per_node 8 train_net.py --config-file {ZOO}",
]


@pytest.mark.parametrize("text", RIGHT)
def test_a_command_that_names_what_exists_passes(text, tmp_path):
    assert page_problems([Block("bash", "", f"{text}\n", 1)], tmp_path) == []


def test_a_command_is_told_with_its_line_on_the_page(tmp_path):
    page = blocks("# Page\n\n1. Step\n\n    ```bash\n    A=b\n\n    make $A\n    ```\n")
    assert page == [Block("bash", "", "A=b\n\nmake $A\n", 5)]
    (problem,) = page_problems(page, tmp_path)
    assert problem.startswith("8: make b: ")


def test_a_command_in_the_text_of_a_page_is_told_with_its_line(tmp_path):
    text = "# Page\n\nBy `make a` or `B=1 make b`.\n\n```bash\nmake `echo c`\n```\nAnd `make d`.\n"
    problems = page_problems(inline(text), tmp_path)
    assert [problem.partition(": make: ")[0] for problem in problems] == [
        "3: make a",
        "3: B=1 make b",
        "8: make d",
    ]


def test_a_variable_of_one_block_is_known_in_the_next(tmp_path):
    page = blocks("```bash\nA=b\n```\n\n```bash title='x'\nA=1 make $A\n```\n")
    assert commands(page, tmp_path) == [Command(("make", "b"), 6, {"A": "1"})]


def test_nothing_is_run_while_commands_are_read(tmp_path):
    text = 'touch a; rm -rf /tmp/nowhere; python -c \'open("b", "w")\' && cd / && source c\n'
    names = [command.arguments[0] for command in shell(text, tmp_path)]
    assert names == ["touch", "rm", "python", "cd", "source"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "prelude", "record"]


@pytest.mark.parametrize(
    "title", ["needs COCO and 8 GPUs", "needs a GPU", "needs nvcc, a network and 20 minutes", ""]
)
def test_a_title_may_name_known_needs(title):
    assert not title_problem(title)
    assert not title_problem("job.sh")


@pytest.mark.parametrize("title", ["needs luck", "needs COCO and luck", "Needs COCO", "need COCO"])
def test_a_title_with_an_unknown_need_is_told(title):
    assert " is not of COCO, a GPU, " in title_problem(title)


def test_commands_in_a_block_of_no_language_are_told(tmp_path):
    page = [Block("", "", "make demo\n", 3)]
    assert page_problems(page, tmp_path) == ["3: a block with commands must say bash"]
