"""metrics.json and TensorBoard's events across new starts: nothing twice, nothing lost."""

import json

import pytest
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lite_detr.engine.resume import Records

MAX_ITER = 60
# Every third iteration is written, and behind the write of every tenth is a checkpoint.
PERIOD, SAVED = 3, 10


def loss(iteration):
    return (iteration * 7) % 11 / 3


def run(folder, start, end, writers, storage):
    """The iterations of a training that has its records from ``folder``; returns its states."""
    states, records = {}, Records(folder, MAX_ITER)
    with storage:
        for iteration in range(start, end):
            storage.iter = iteration
            storage.put_scalar("total_loss", loss(iteration))
            storage.put_scalar("lr", 1 / (1 + iteration), smoothing_hint=False)
            if (iteration + 1) % SAVED == 0:
                states[iteration] = json.loads(json.dumps(records.state_dict(storage)))
            if (iteration + 1) % 8 == 0:
                storage.put_scalar("bbox/AP", iteration, smoothing_hint=False)
            if (iteration + 1) % PERIOD == 0:
                for writer in writers:
                    writer.write()
    for writer in writers:
        writer.close()
    return states


def go_on(folder, iteration, state, end):
    """A new start from the checkpoint of an iteration."""
    records, storage = Records(folder, MAX_ITER), EventStorage(iteration)
    records.restore(state, storage)
    writers = records.writers_from(iteration, state["size"])
    # What the hooks behind the checkpoint did in that iteration is done again.
    with storage:
        if (iteration + 1) % 8 == 0:
            storage.put_scalar("bbox/AP", iteration, smoothing_hint=False)
        if (iteration + 1) % PERIOD == 0:
            for writer in writers:
                writer.write()
    return run(folder, iteration + 1, end, writers, storage)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, 0, MAX_ITER, Records(folder, MAX_ITER).writers(), EventStorage())
    return folder


@pytest.fixture
def interrupted(tmp_path):
    """A folder with the records of 47 iterations, and the states of its checkpoints."""
    folder = tmp_path / "interrupted"
    writers = Records(folder, MAX_ITER).writers()
    return folder, run(folder, 0, 47, writers, EventStorage())


@pytest.mark.parametrize("iteration", [9, 19, 29, 39])
def test_the_records_are_those_of_a_training_without_interruption(iteration, interrupted, whole):
    """Medians over iterations on both sides of the new start, and evaluations, each once."""
    folder, states = interrupted
    go_on(folder, iteration, states[iteration], MAX_ITER)
    assert (folder / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def test_a_training_may_go_on_often_and_fall_back(interrupted, whole):
    folder, states = interrupted
    states |= go_on(folder, 39, states[39], 52)
    states |= go_on(folder, 29, states[29], 43)
    go_on(folder, 39, states[39], MAX_ITER)
    assert (folder / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def test_what_is_cut_off_is_kept_aside(interrupted):
    folder, states = interrupted
    lines = (folder / "metrics.json").read_text().splitlines()
    Records(folder, MAX_ITER).writers_from(29, states[29]["size"])
    kept = (folder / "metrics.json").read_text().splitlines()
    removed = (folder / "metrics.removed.json").read_text().splitlines()
    assert kept + removed == lines
    assert max(json.loads(line)["iteration"] for line in kept) < 29
    assert min(json.loads(line)["iteration"] for line in removed) >= 26


def test_a_half_written_line_goes_too(interrupted):
    folder, states = interrupted
    size = states[39]["size"]
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 4')
    Records(folder, MAX_ITER).writers_from(39, size)
    assert (folder / "metrics.json").stat().st_size == size


def test_a_start_without_a_checkpoint_leaves_no_record_of_the_one_before(interrupted):
    folder, _ = interrupted
    Records(folder, MAX_ITER).writers_from(0, size=0)
    assert (folder / "metrics.json").read_text() == ""
    assert len((folder / "metrics.removed.json").read_text().splitlines()) > 15


def test_a_folder_without_records_gets_new_ones(tmp_path, interrupted):
    """A checkpoint alone was copied there."""
    _, states = interrupted
    go_on(tmp_path / "new", 39, states[39], MAX_ITER)
    first = json.loads((tmp_path / "new" / "metrics.json").read_text().splitlines()[0])
    assert first["iteration"] >= 39


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars(name)]


@pytest.mark.parametrize("name", ["total_loss", "lr", "bbox/AP"])
def test_tensorboard_shows_each_step_once(name, interrupted, whole):
    folder, states = interrupted
    go_on(folder, 29, states[29], MAX_ITER)
    assert scalars(folder, name) == scalars(whole, name)
