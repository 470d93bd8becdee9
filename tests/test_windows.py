"""sources/windows.py against plain loops, and the windows that `Split.batches` gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import dataset
from sources.dataset import Split
from sources.windows import begins, run_ends, windows, windows_for_all

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)  # of the runs
ODD = st.sampled_from([1, 3, 9, 27])


def where_runs_begin(lengths):
    return np.concatenate([[True] + [False] * (n - 1) for n in lengths])


def padded(lengths, centre, frames):
    """The window around a frame: its run, with the frames at the ends repeated by NumPy."""
    ends = np.cumsum(lengths)
    run = np.searchsorted(ends, centre, side="right")
    rows = np.pad(np.arange(ends[run] - lengths[run], ends[run]), frames // 2, mode="edge")
    at = centre - (ends[run] - lengths[run])
    return rows[at : at + frames]


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, frames=ODD, first=st.booleans())
def test_windows_repeat_the_frames_at_the_ends(lengths, frames, first):
    new = where_runs_begin(lengths)
    new[0] = first  # the first frame begins a run, whatever is said of it
    rows, own = windows(run_ends(new), np.arange(len(new)), frames)
    for centre in range(len(new)):
        expected = padded(lengths, centre, frames)
        assert rows[centre].tolist() == expected.tolist()
        inner = expected[own[centre]]
        assert inner.tolist() == sorted(set(expected)) and centre in inner


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, frames=ODD, every=st.booleans())
def test_every_frame_counts_once(lengths, frames, every):
    new = where_runs_begin(lengths)
    rows, counts = windows_for_all(new, frames, every)
    assert sorted(rows[counts]) == list(range(len(new)))
    run = np.cumsum(new)
    assert (run[rows] == run[rows[:, :1]]).all()  # no window looks into another sequence
    if every:  # not more windows than side by side
        assert len(rows) == sum(-(-n // frames) for n in lengths)
    else:
        assert (counts.sum(1) == 1).all() and counts[:, frames // 2].all()


def test_a_gap_begins_another_run():
    sequence, frame = np.array([0, 0, 0, 1, 1, 3, 3]), np.array([4, 5, 7, 8, 9, 10, 11])
    assert np.flatnonzero(begins(sequence, frame)).tolist() == [0, 2, 3, 5]


def split_of(tiny_sequences, every=True, frames=9, limit=0):
    return Split(tiny_sequences / "sequences", "train", CPU).in_windows(frames, every, limit)


@pytest.mark.parametrize("every", [True, False])
def test_batches_are_windows_of_what_was_prepared_once(tiny_sequences, every):
    split, seen = split_of(tiny_sequences, every), []

    def prepare(block):
        seen.append(block)
        return dict(x=torch.arange(split.n), y=block["y"])

    torch.manual_seed(0)
    of_passes = list(split.batches(2, np.random.default_rng(0), prepare=prepare, passes=2,
                                   vary=lambda block: block | dict(y=block["y"] + 1)))
    batches, again = of_passes[: split.steps(2)], of_passes[split.steps(2) :]
    seen = [block | dict(y=block["y"] + 1) for block in seen]
    assert len(again) == len(batches) and not torch.equal(again[0]["x"], batches[0]["x"])
    windows_in_all = 256 // 9 if every else 256
    assert len(seen) == 1 and len(batches) == split.steps(2) == windows_in_all // 2
    own_windows = windows(run_ends(split.begins()), np.arange(split.n), 9)
    for batch in batches:
        centres = batch["x"][:, 4].numpy()
        assert np.array_equal(batch["x"], own_windows[0][centres])
        y, own = seen[0]["y"][batch["x"]], torch.from_numpy(own_windows[1][centres])
        assert torch.equal(batch["y"], y if every else y[:, 4])
        assert torch.equal(batch["own"], own if every else own[:, 4]) and batch["own"].any()
    assert len(set(torch.cat([b["x"][:, 4] for b in batches]).tolist())) == 2 * len(batches)


@pytest.mark.parametrize("every", [True, False])
def test_processes_share_every_batch_of_windows(tiny_sequences, monkeypatch, every):
    split = split_of(tiny_sequences, every)

    def epoch():
        torch.manual_seed(0)
        return list(split.batches(5, np.random.default_rng(0)))

    alone, parts = epoch(), []
    for rank in (0, 1):
        monkeypatch.setattr(dataset, "part", lambda n, r=rank: slice(r * n // 2, (r + 1) * n // 2))
        parts.append(epoch())
    for whole, one, two in zip(alone, *parts, strict=True):
        assert len(one["x_s"]) == 2 and len(two["x_s"]) == 3
        assert all(torch.equal(whole[k], torch.cat([one[k], two[k]])) for k in whole)


@pytest.mark.parametrize("done", [1, 14, 17])
def test_an_interrupted_epoch_goes_on_with_the_same_windows(tiny_sequences, done):
    split = split_of(tiny_sequences)

    def run(done, random):
        for batch in split.batches(2, np.random.default_rng(0), done=done, random=random, passes=2,
                                   vary=lambda block: dict(x=block["y"] * torch.rand(1))):
            yield (batch["x"], torch.rand(1)), torch.get_rng_state(), dict(random)  # dropout

    torch.manual_seed(0)
    whole = list(run(0, {}))
    _, now, random = whole[done - 1]
    torch.set_rng_state(now)
    rest = list(run(done, random))
    assert len(whole) == len(rest) + done == 28
    for (a, *_), (b, *_) in zip(whole[done:], rest, strict=True):
        assert all(map(torch.equal, a, b))


def test_a_limit_takes_whole_sequences_from_all_over(tiny_sequences):
    everything, some = split_of(tiny_sequences), split_of(tiny_sequences, limit=100)
    runs = np.split(everything.rows, np.flatnonzero(everything.begins())[1:])
    kept = [run for run in runs if np.isin(run, some.rows).any()]
    assert np.concatenate(kept).tolist() == some.rows.tolist() and 1 < len(kept) < len(runs)


def test_single_frames_have_no_windows(tiny_data):
    with pytest.raises(ValueError, match="tiny has single frames, and no sequences: make some with "
                                         "`python prepare_data.py --sequences`"):
        Split(tiny_data / "tiny", "train", CPU).in_windows(9, True)
