"""slimkernels tune: the search, the table it writes, and what it says where it cannot run."""

import contextlib
import json
import os

import pytest
import torch
from op_cases import device_of

pytest.importorskip("triton", reason="what is tuned are Triton's kernels")

from slimkernels.backends.triton import _attention_tiles as tiles
from slimkernels.backends.triton import _attention_tuning as tuning
from slimkernels.scripts import tune, tune_attention
from slimkernels.scripts.main import main as command

DEVICE = device_of("triton")
CALL = ("forward", 64, torch.bfloat16, False, torch.device("cuda", 0))  # asks the table for KEYS
KEYS = ("half", "plain", "forward", "64")
TINY = tune_attention.Sizes(batch=1, tokens=32, checked_tokens=32, channels=32)
DEFAULT = json.loads((tiles.SHIPPED / "default.json").read_text())


@pytest.fixture(autouse=True)
def only_the_default_table(monkeypatch, tmp_path):
    """As for a new user of a GPU that nobody has measured, whichever is in this machine."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    tiles.forget_tables()
    yield
    tiles.forget_tables()


def tried(keys=KEYS):
    """The entry that runs at the moment."""
    return tuple(tiles._tried[keys])


def search(cost, is_right=lambda: True, before=(64, 64, 4, 2), keys=KEYS):
    """Of a kernel that does nothing, with a clock that knows what each entry costs."""
    return tuning.search(keys, list(before), is_right, lambda: None, lambda run: cost(tried(keys)))


# The search


def test_the_fastest_entry_is_found_blocks_first_then_stages():
    found = search(lambda e: 10.0 - 4 * (e[:3] == (128, 64, 8)) - (e[3] == 3))
    assert found.entry == [128, 64, 8, 3]
    assert found.speedup == pytest.approx(10 / 5)
    assert found.tried == tuning.most_candidates(KEYS, [64, 64, 4, 2]) <= 18
    assert not found.skipped


def test_what_fails_or_is_wrong_is_not_taken_however_fast():
    def is_right():
        if tried()[0] == 128:
            raise RuntimeError("out of resources")
        return tried()[1] != 32

    found = search(lambda e: 1.0 if e[0] == 128 or e[1] == 32 else 5.0 - (e[2] == 2), is_right)
    assert found.entry == [64, 64, 2, 2]
    assert found.skipped == {"RuntimeError": 4, "wrong numbers": 3}


def test_noise_is_no_reason_to_change():
    found = search(lambda e: 10.0 if e == (64, 64, 4, 2) else 9.9)
    assert (found.entry, found.speedup) == ([64, 64, 4, 2], 1.0)


def test_where_the_entry_in_use_does_not_run_any_other_is_better():
    def is_right():
        return tried()[0] < 64

    found = search(lambda e: float(e[2]), is_right)
    assert found.entry[0] == 32 and found.speedup == 1.0
    assert search(lambda e: 1.0, lambda: False).entry is None


def test_a_slow_candidate_gets_no_second_turn_but_the_entry_in_use_does():
    turns = dict.fromkeys([(64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)], 0)

    def clock(run):
        turns[tried()] += 1
        return {64: 20.0, 32: 1.0}[tried()[1]]

    tuning._race(KEYS, [list(entry) for entry in turns], [64, 64, 4, 2], None, clock)
    assert list(turns.values()) == [tuning.TURNS + 1, 2, tuning.TURNS + 1]


@pytest.mark.parametrize("keys", tiles.PLACES, ids="/".join)
def test_candidates_are_valid_and_begin_with_the_entry_in_use(keys):
    before = entry_of(DEFAULT, keys)
    found = tuning.candidates(keys, before)
    assert found[0] == before and 1 < len(found) <= 15
    assert len({tuple(entry) for entry in found}) == len(found)
    for entry in found:
        assert tiles._fault(nested(keys, entry)) is None


# The kernels


@pytest.mark.parametrize("dtype, kind", [("half", "plain"), ("half", "rich"), ("float", "rich")])
def test_kernels_are_launched_alone_in_the_tiles_tried_and_checked(dtype, kind, monkeypatch):
    case = tune_attention.Case(dtype, kind, "64", TINY, DEVICE)
    for keys in tiles.PLACES:
        if (keys[0], keys[1], keys[3]) != (dtype, kind, "64"):
            continue
        kernel = keys[2]
        assert case.is_right(kernel), keys
        with tiles.trying(keys, [24, 24, 4, 1]):  # no power of two: if it is used, it fails
            for runs in (case.runs, case.small_runs):
                with pytest.raises(Exception, match="power of 2|power of two|24"):
                    runs[kernel]()
        right = case.small_runs[kernel]
        for wrong in (lambda x: 1.1 * x, lambda x: x * torch.nan):
            changed = tuple(wrong(x) for x in right())
            monkeypatch.setitem(case.small_runs, kernel, lambda changed=changed: changed)
            assert not case.is_right(kernel), keys


def test_dq_of_float32_is_timed_with_the_sums_that_share_its_tiles(monkeypatch):
    case = tune_attention.Case("float", "plain", "64", TINY, DEVICE)
    sums = []
    monkeypatch.setattr(tuning, "sum_rows", lambda *args: sums.append(args))
    case.runs["dkdv"]()
    assert not sums
    case.runs["dq"]()
    assert len(sums) == 1


# The command


def entry_of(table, keys):
    for key in keys:
        table = table[key]
    return table


def nested(keys, entry):
    for key in reversed(keys):
        entry = {key: entry}
    return entry


class Clock:
    """One more stage is faster; no kernel runs."""

    def __init__(self, interrupt_at=None):
        self.runs, self.interrupt_at = 0, interrupt_at

    def __call__(self, run):
        self.runs += 1
        if self.runs == self.interrupt_at:
            raise KeyboardInterrupt
        (entry,) = tiles._tried.values()
        return 10.0 - entry[3]


@pytest.fixture
def few_candidates(monkeypatch):
    """Each is interpreted: the entry in use, and its stages."""
    monkeypatch.setattr(tuning, "candidates", lambda keys, before: [before])
    monkeypatch.setattr(tuning, "_STAGES", (2, 3))


def run(path, clock, **options):
    options = tune.Options("attention", quick=True, kernel="forward", width=64, **options)
    session = tune_attention.Session(path, DEVICE, options.again)
    return tune.tune(options, session, TINY, clock, "a GPU")


def test_a_table_is_written_and_used(few_candidates, tmp_path, capsys):
    path, gpu = tiles.user_table("Some GPU"), torch.device("cuda", 0)
    assert path == tmp_path / ".config/slimkernels/attention/some-gpu.json"
    default = tiles.tiles("forward", 64, torch.bfloat16, False, gpu)
    assert default["num_stages"] == 2  # and now in a cache
    assert run(path, Clock()) == 0
    for rich in (False, True):
        assert tiles.tiles("forward", 64, torch.bfloat16, rich, gpu)["num_stages"] == 3
    assert tiles.tiles("dq", 64, torch.bfloat16, False, gpu)["num_stages"] == 2
    said = capsys.readouterr().out
    assert f"Tuning attention on a GPU: 2 of 2 entries, at most 4 candidates, into {path}." in said
    assert "half/plain/forward/64: [128, 64, 4, 2] -> [128, 64, 4, 3], 1.14x (2 tried)" in said
    assert "2 of 2 entries are faster than before, in the middle 1.14 times as fast" in said
    assert path.read_text().count("\n") < 25  # an entry is one line
    assert [p.name for p in path.parent.iterdir()] == ["some-gpu.json"]


def test_an_interrupted_run_goes_on_and_again_begins_anew(few_candidates, tmp_path, capsys):
    path, whole = tmp_path / "table.json", Clock()
    assert run(path, whole) == 0
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(path, Clock(interrupt_at=whole.runs // 2 + 2))
    table = tiles.read_table(path)
    assert set(tiles.entries_of(table)) == {KEYS}
    tiles.write_table(path, {**table, "float": {"plain": {"dq": {"256": [16, 16, 2, 1]}}}})
    rest = Clock()
    assert run(path, rest) == 0 and rest.runs == whole.runs // 2
    assert "1 of 2 entries, at most 2 candidates" in capsys.readouterr().out
    assert len(tiles.entries_of(tiles.read_table(path))) == 3
    assert run(path, Clock(interrupt_at=1)) == 0  # nothing is left, so nothing is measured
    assert "has all 2 entries; --again" in capsys.readouterr().out
    everything = Clock()
    assert run(path, everything, again=True) == 0 and everything.runs == whole.runs


def test_time_that_is_over_leaves_the_rest_for_the_next_run(few_candidates, tmp_path, capsys):
    assert run(tmp_path / "table.json", Clock(), minutes=1e-9) == 0
    assert "2 entries are left: the same command goes on." in capsys.readouterr().out
    with pytest.raises(ValueError, match="--minutes must be positive; got 0"):
        run(tmp_path / "table.json", Clock(), minutes=0)


def test_a_table_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path, table = tmp_path / "table.json", nested(KEYS, [64, 64, 4, 2])
    tiles.write_table(path, table)

    def fail(*names):
        raise OSError("disk full")

    monkeypatch.setattr(tiles.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiles.write_table(path, nested(KEYS, [16, 16, 4, 2]))
    assert tiles.read_table(path) == table and len(list(tmp_path.iterdir())) == 1


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(["tune", "attention"]) == 2
    captured = capsys.readouterr()
    said = "slimkernels tune: it measures on a GPU, and torch sees none here\n"
    assert (captured.out, captured.err) == ("", said)


def test_another_op_gets_the_list_of_those_that_can_be_tuned(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    assert command(["tune", "softmax"]) == 2
    said = "slimkernels tune: 'softmax' cannot be tuned; what can is attention\n"
    assert capsys.readouterr().err == said


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one, whose kernels and clock are this machine's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tune, "resolve_device", lambda name: torch.device(name))
    session = tune_attention.Session
    monkeypatch.setattr(
        tune_attention, "Session", lambda path, device, again: session(path, DEVICE, again)
    )
    monkeypatch.setattr(tune_attention, "Sizes", lambda: TINY)
    monkeypatch.setattr(tuning, "EventClock", lambda device: Clock())


ONE = ["tune", "attention", "--kernel", "forward", "--width", "64", "--quick"]


def test_the_command_from_end_to_end(gpu, few_candidates, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tuning, "EventClock", lambda device: Clock(interrupt_at=1))
    assert command(ONE) == 130
    assert "Interrupted. What was measured is kept" in capsys.readouterr().out
    monkeypatch.setattr(tuning, "EventClock", lambda device: Clock())
    assert command(ONE) == 0
    assert set(tiles.entries_of(tiles.read_table(tiles.user_table("Some GPU")))) == {
        KEYS,
        ("half", "rich", "forward", "64"),
    }
    other = tmp_path / "new folder" / "table.json"
    assert command([*ONE, "--out", str(other)]) == 0 and other.exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--width", "512"], "--quick leaves out that --width"),
        (["--minutes", "-1"], "--minutes must be positive; got -1.0"),
        (["--device", "cpu"], "--device must be cuda or cuda:N; got cpu"),
        (["--out", os.devnull + "/table.json"], "null/table.json cannot be written: file exists"),
    ],
)
def test_a_wrong_option_is_one_sentence(gpu, few_candidates, options, sentence, capsys):
    assert command([*ONE, *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("slimkernels tune: ") and sentence in said and said.count("\n") == 1


# Tables


@pytest.mark.parametrize("path", sorted(tiles.SHIPPED.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_tables_are_valid(path):
    entries = tiles.entries_of(tiles.read_table(path))
    if path.stem == "default":
        assert set(entries) == set(tiles.PLACES) and len(entries) == 56


def test_every_default_fits_the_registers_that_candidates_must_fit():
    assert all(tuning._fits(keys, *entry_of(DEFAULT, keys)[:3]) for keys in tiles.PLACES)


DAMAGED = {
    "{": "Expecting property name",
    "[]": "it holds a list, not an object",
    '{"half": 3}': "there is no entry half",
    '{"half": {"plain": {"dbias": {"64": [16, 16, 4, 1]}}}}': "no entry half/plain/dbias/64",
    '{"half": {"plain": {"forward": {"64": [64, 64, 4]}}}}': r"must be \[BLOCK_M, .* got \[64, 64",
    '{"half": {"plain": {"forward": {"64": {"a": 1}}}}}': "half/plain/forward/64 must be",
    '{"half": {"plain": {"forward": {"64": [48, 64, 4, 2]}}}}': "BLOCK_M .* power of two .* got 48",
    '{"half": {"plain": {"forward": {"64": [64, 8, 4, 2]}}}}': "BLOCK_N .* from 16 to 512; got 8",
    '{"half": {"plain": {"forward": {"64": [64, 64, 3, 2]}}}}': "num_warps .* got 3",
    '{"half": {"plain": {"forward": {"64": [64, 64, 4, 0]}}}}': "num_stages .* got 0",
    '{"half": {"plain": {"forward": {"64": [64, 64, true, 2]}}}}': "must be .* got",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_is_a_sentence_that_names_its_file(text, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(text)
    monkeypatch.setattr(tiles, "user_table", lambda name: path)
    with pytest.raises(tiles.TableError, match=DAMAGED[text]) as raised:
        tiles.tiles(*CALL)
    said = str(raised.value)
    assert said.startswith(f"{path} is not a table of attention's tiles: ")
    assert said.endswith("Delete it, or make it anew with `slimkernels tune attention --again`")
    with pytest.raises(tiles.TableError):  # tuning does not write over what it cannot read
        tune_attention.Session(path, DEVICE, again=False)
    session = tune_attention.Session(path, DEVICE, again=True)
    assert session.lacking([KEYS]) == [KEYS] and "is made anew" in session.note


def test_a_table_of_another_triton_is_not_used_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    table = nested(KEYS, [16, 16, 2, 1]) | {"made": {"triton": "2.1.0"}}
    monkeypatch.setattr(tiles, "user_table", lambda name: path)
    tiles.write_table(path, table)
    with pytest.warns(UserWarning, match="table.json was made with Triton 2.1.0 .* not used"):
        found = tiles.tiles(*CALL)
    assert list(found.values()) == entry_of(DEFAULT, KEYS)
    session = tune_attention.Session(path, DEVICE, again=False)
    assert session.lacking([KEYS]) == [KEYS]
