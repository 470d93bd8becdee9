"""ablate.py and studies.py: end to end with tiny sizes, what is trained and what is shared, the
verdicts on numbers made by hand, and the costs against a count by hand."""

import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, fields, make_dataclass, replace

import matplotlib.image
import pytest
import torch
from conftest import RUN_SIZES
from hypothesis import given
from hypothesis import strategies as st

import ablate
import studies
import train
from checkpoints import Run
from hipart import Config
from studies import STUDIES, WITH, Study, Variant
from train import PRESETS, Training

SMALL = {k: v for k, v in RUN_SIZES.items() if k != "epochs_equal"} | dict(
    K_s=16, K_d=16, epochs_1=2, warmup_free=2, epochs_2=1, epochs_3=1, passes_3=1)
TINY_PRESET = tuple({k: v for k, v in SMALL.items() if k in vars(kind())}
                    for kind in (Config, Training))


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """A function that runs ablate.py in an empty folder, with a preset that trains in seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "quick", TINY_PRESET)
    monkeypatch.setitem(studies.BASE, "quick", ({}, {}))
    monkeypatch.setattr(ablate, "ROUNDS", 2)
    monkeypatch.setattr(ablate, "LEAST", 0.0)
    precision = torch.get_float32_matmul_precision()

    def run(*options, seeds=1, data=f"{tiny_data}/tiny"):
        monkeypatch.setattr(sys, "argv", ["ablate.py", *options, "--seeds", str(seeds), "--data",
                                          data, "--device", "cpu"])
        ablate.main()

    yield run
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def trained(monkeypatch):
    """The checkpoints of all trainings that begin or go on, in their order."""
    names, init = [], train.Loop.__init__

    def noted(self, run, name, *args, **options):
        names.append(f"{run.path.name}/{name}")
        init(self, run, name, *args, **options)

    monkeypatch.setattr(train.Loop, "__init__", noted)
    return names


def refused(capsys, run, *args, **options):
    with pytest.raises(SystemExit) as e:
        run(*args, **options)
    said = capsys.readouterr().err
    assert e.value.code == 2
    return said


def of(which):
    kind, n = which.split()
    return f"--{kind}", n


# --------------------------------------------------------------------------------------------------
# End to end


def test_a_table_from_end_to_end(tiny, trained, tmp_path, capsys):
    """Table 5: stages 1 and 2 are trained once for all its variants; a second time, nothing is."""
    tiny("--table", "5")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "runs/ablations/table_5_quick.json").read_text())
    assert {"device", "commit", "date"} <= report["machine"].keys() and report["seeds"] == 1
    assert list(report["numbers"]) == [v.name for v in STUDIES["table 5"].variants if not v.lacks]
    for name, numbers in report["numbers"].items():
        assert {"test: MPJPE, mm", "unseen: MPJPE, mm"} <= numbers.keys()
        assert ("test: fine points, px" in numbers) == (name in ("48", "96", "48 + 96"))
        assert all(len(v) == 1 and v[0] > 0 for v in numbers.values())
    assert len(report["verdicts"]) == 4 * 2  # orderings on test and on unseen motion
    page = (tmp_path / "runs/ablations/table_5_quick.md").read_text()
    assert page in printed and page.count("not made: the tokenizer has two levels") == 2
    assert "52.1" in page and "Over the seeds, an ordering *holds*" in page
    assert len(trained) == len(set(trained)) == 2 + 9  # stages 1 and 2, and the lifters
    before = list(trained)
    tiny("--table", "5")
    again = json.loads((tmp_path / "runs/ablations/table_5_quick.json").read_text())
    assert trained == before and again["numbers"] == report["numbers"]
    capsys.readouterr()
    tiny("--table", "5", "--dry-run", seeds=3)
    said = capsys.readouterr().out
    assert "22 of 33 trainings are left" in said and said.count("there, took") == 11
    # HiPART itself is in Table 3, too
    tiny("--table", "3", "--dry-run")
    said = capsys.readouterr().out
    assert said.count("there, took") == 3 and "9 of 12 trainings are left" in said


def test_a_third_level_is_left_out_where_the_data_have_none(tiny, tiny_data, tmp_path, capsys):
    """As those of Human3.6M, or those that an earlier version made."""
    shutil.copytree(tiny_data / "tiny", tmp_path / "old")
    for path in (tmp_path / "old").glob("*/x_192.npy"):
        path.unlink()
    tiny("--table", "5", data="old")
    report = json.loads((tmp_path / "runs/ablations/table_5_quick.json").read_text())
    assert len(report["numbers"]) == 7 and len(report["verdicts"]) == 3 * 2
    page = (tmp_path / "runs/ablations/table_5_quick.md").read_text()
    assert page.count("not made: it takes an MLP as lifter, and a data set with x_192") == 2


def test_a_third_level_needs_an_mlp(tiny, capsys):
    tiny("--table", "5", "--preset", "paper", "--dry-run")
    said = capsys.readouterr().out
    assert "48 + 96, ground truth" in said and "192" not in said


def test_data_that_are_not_read_may_have_any_name(tiny, tmp_path):
    tiny("--table", "8", data="x" * 300)
    assert (tmp_path / "runs/ablations/table_8_quick.md").is_file()


def test_an_interrupted_table_goes_on(tiny, trained, tmp_path, monkeypatch, capsys):
    """Ctrl-C in stage 1 of a and in stage 2 of b: nothing that is finished is trained again, and
    the numbers are those of a run without an interruption."""
    b = dict(shared_codebook=True, generation="next-token")
    monkeypatch.setitem(STUDIES, "table 3", Study(
        "", ("",), (Variant("a", ("",)), Variant("b", ("",), b)), (("a", "b"),)))
    update, steps = train.Loop.update, []

    def pulled(self, *args):
        update(self, *args)
        steps.append(self.name)
        if len(steps) in (5, 24):  # stages 1 to 3 take 8, 4 and 2 steps
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as m:
        m.setattr(train.Loop, "update", pulled)
        for stage in (1, 2):
            with pytest.raises(SystemExit) as e:
                tiny("--table", "3")
            assert e.value.code == 128 + signal.SIGINT and steps[-1] == f"stage{stage}"
            assert "go on with `python ablate.py --table 3" in capsys.readouterr().err
        tiny("--table", "3")
    assert len(steps) == 2 * (8 + 4 + 2) and len(trained) == 2 * 3 + 2
    path = tmp_path / "runs/ablations/table_3_quick.json"
    numbers = json.loads(path.read_text())["numbers"]
    (tmp_path / "runs").rename(tmp_path / "before")
    tiny("--table", "3")
    assert json.loads(path.read_text())["numbers"] == numbers


def test_a_figure_from_end_to_end(tiny, tmp_path, monkeypatch):
    study = STUDIES["figure 5"]
    few = replace(study, variants=study.variants[:2], better=study.better[:1], axes=("D", "K_s"))
    monkeypatch.setitem(STUDIES, "figure 5", few)
    tiny("--figure", "5", seeds=2)
    assert matplotlib.image.imread(tmp_path / "runs/ablations/figure_5_quick.png").shape[1] == 800


def test_table_8_trains_nothing(tiny, trained, tmp_path):
    tiny("--table", "8")
    report = json.loads((tmp_path / "runs/ablations/table_8_quick.json").read_text())
    (numbers,) = report["numbers"].values()
    assert list(numbers) == [f"poses/s, batch {n}" for n in (1, 8, 64, 512)] and not trained
    assert all(len(v) == 2 and min(v) > 0 for v in numbers.values())
    page = (tmp_path / "runs/ablations/table_8_quick.md").read_text()
    assert "a V100" in page and "another method" in page


def test_lifters_of_sequences_from_end_to_end(tiny, trained, tiny_sequences, tmp_path, capsys):
    """Table 6: one tokenizer and one HiARM, all three lifters with each of three inputs."""
    assert "no sequences: make some with `python prepare_data.py --sequences`" in refused(
        capsys, tiny, "--table", "6")
    assert not trained
    tiny("--table", "6", data=f"{tiny_sequences}/sequences")
    report = json.loads((tmp_path / "runs/ablations/table_6_quick.json").read_text())
    assert list(report["numbers"]) == [v.name for v in STUDIES["table 6"].variants]
    assert {"test: MPJPE, mm", "unseen: MPJPE, mm"} <= report["numbers"]["spatial"].keys()
    assert len(trained) == len(set(trained)) == 2 + 9
    lifters = {name.split("/")[1] for name in trained} - {"stage1", "stage2"}
    assert lifters == {f"stage3_{kind}{source}_0" for kind in ("", "poseformer27_", "mixste27_")
                       for source in train.TEMPORAL_INPUTS}
    run = Run(ablate.FOLDER, Config(), Training(), torch.device("cpu"),
              data=f"{tiny_sequences}/sequences")
    (job,) = ablate.jobs_of(STUDIES["table 6"].variants[6], STUDIES["table 6"], "quick", 0, run)
    lifter, b = train.load_lifter(job.run, "mixste27_sparse"), next(run.split("test").blocks())
    for begins, same in ((b["begins"], True), (torch.ones_like(b["begins"]), False)):
        with torch.no_grad():
            off = (train.lift(lifter, b["x_s"], b["conf"], begins) - b["y"]).norm(dim=-1).mean(-1)
        of_actions = [off[b["action"] == action].mean() for action in b["action"].unique()]
        found = report["numbers"]["MixSTE, 27 frames"]["test: MPJPE, mm"][0]
        assert (found == pytest.approx(float(sum(of_actions)) / len(of_actions), rel=1e-5)) == same
    claims = [claim for claim, *_ in report["verdicts"]]
    assert "spatial gains more than MixSTE, 27 frames" in claims and len(claims) == 2 * (3 + 2)


@pytest.mark.parametrize("which", [w for w, study in STUDIES.items() if study.trains])
def test_every_study_can_be_planned(which, tiny, trained, tiny_data, tiny_sequences, capsys):
    data = f"{tiny_sequences}/sequences" if STUDIES[which].gains else f"{tiny_data}/tiny"
    tiny(*of(which), "--dry-run", "--preset", "standard", seeds=2, data=data)
    said = capsys.readouterr().out
    assert "trainings are left: about" in said and not trained
    for variant in STUDIES[which].variants:
        assert (f"| {variant.name} " in said) == (not variant.lacks)


def test_what_there_is(tiny, capsys):
    tiny("--list")
    said = capsys.readouterr().out
    assert all(f"--{which}" in said and study.title in said for which, study in STUDIES.items())


def test_bad_input_is_said_in_a_sentence(tiny, tmp_path, capsys, monkeypatch):
    assert "--seeds must be at least 1, found 0" in refused(capsys, tiny, "--table", "3", seeds=0)
    (tmp_path / "testing").mkdir()
    (tmp_path / "testing/meta.json").write_text('{"splits": {"test": {"n": 5}}}')
    for data in ("nowhere", "testing"):
        for more in ([], ["--dry-run"]):
            monkeypatch.setattr(sys, "argv", ["ablate.py", "--table", "3", "--data", data, *more])
            assert f"{data} holds no data set to train on: " in refused(capsys, ablate.main)
    monkeypatch.setattr(ablate, "world_size", lambda: 2)
    assert "not with torchrun" in refused(capsys, tiny, "--table", "3")


# --------------------------------------------------------------------------------------------------
# The table of variants


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("which", STUDIES)
def test_every_variant_is_a_model_of_its_own(which, preset):
    study = STUDIES[which]
    names = {v.name for v in study.variants if not v.lacks}
    assert {name for pair in study.better for name in pair} <= names
    study = study.without_third_level() if preset == "paper" else study
    made = [v for v in study.variants if not v.lacks]
    found = [(*map(tuple, (asdict(o).items() for o in v.options(preset, study.share))), v.input)
             for v in made]
    assert len(set(found)) == len(made)
    assert all(len(v.paper) == len(study.paper) for v in study.variants)
    assert len({v.name for v in made}) == len(made)
    assert {name for a, b, _ in study.faster for name in (a, b)} <= names
    assert {name + plus for pair in study.gains for name in pair for plus in ("", WITH)} <= names


def test_with_the_papers_preset_the_first_rows_are_the_papers_model():
    for which in ("table 3", "table 4", "table 9", "figure 5"):
        config, training = STUDIES[which].variants[0].options("paper")
        assert config == Config() and training == Training(epochs_1=40)
    rows = [v.options("paper")[0] for v in STUDIES["table 9"].variants]
    assert [(c.encoder_blocks, c.gcsab_blocks, c.encoder_width, c.width) for c in rows] == [
        (4, 12, 128, 128), (2, 6, 128, 128), (3, 8, 128, 128), (5, 16, 128, 128), (4, 12, 96, 96),
        (4, 12, 256, 256)]
    sizes = {(c.D, c.K_s, c.K_d) for c in (v.options("paper")[0]
                                           for v in STUDIES["figure 5"].variants)}
    assert {(32, 2048, 2048), (256, 2048, 2048), (128, 512, 2048), (128, 4096, 2048),
            (128, 2048, 512), (128, 2048, 3072), (128, 2048, 4096)} <= sizes


OF_STAGE = {  # options that are not named for their stage
    1: "D K_s K_d shared_codebook encoder_blocks encoder_width decoder_blocks decoder_width "
       "token_hidden n_actions beta lambda_l lambda_g tau cosine_local lambda_r ema_decay "
       "restart_below limit warmup_free",
    2: "width heads mlp_ratio lsab_blocks gcsab_blocks ph_blocks dropout lambda_d generation "
       "condition soft soft_targets history_dropout lambda_p epochs_soft",
    3: "lifter frames lifter_width lifter_blocks lifter_heads levels epochs_equal regressor_width",
}


@pytest.mark.parametrize("kind", [Config, Training])
def test_every_option_belongs_to_its_stage(kind):
    """`until` goes by the order of the fields of Config and Training. An option that stands in the
    wrong place would make variants share what they must not."""
    plain = make_dataclass("Plain", [(f.name, int, 0) for f in fields(kind)])
    changed = plain(*[1] * len(fields(kind)))
    for option in fields(kind):
        named = {stage: option.name in names.split() or option.name.endswith(f"_{stage}")
                 for stage, names in OF_STAGE.items()}
        (own,) = (stage for stage, here in named.items() if here)
        for stage in (1, 2, 3):
            kept = getattr(ablate.until(stage, changed, plain()), option.name)
            assert kept == (stage >= own), option.name


def test_all_variants_have_as_many_actions_as_the_data(tiny_data):
    like = Run(ablate.FOLDER, Config(n_actions=40), Training(), torch.device("cpu"),
               data=f"{tiny_data}/tiny")
    for study in STUDIES.values():
        for variant in study.variants:
            jobs = ablate.jobs_of(variant, study, "quick", 0, like)
            assert {job.run.config.n_actions for job in jobs} == {40}


def test_tables_6_and_10_share_what_they_can(tiny_sequences):
    like = Run(ablate.FOLDER, Config(), Training(), torch.device("cpu"),
               data=f"{tiny_sequences}/sequences")

    def trained(which, *names):
        study = STUDIES[which]
        return [[job.run.path for job in ablate.jobs_of(v, study, "quick", 0, like)]
                for v in study.variants if v.name.removesuffix(WITH) in names]

    assert trained("table 6", "spatial", "MixSTE, 27 frames") == trained(
        "table 10", "1 frame", "27 frames")


def test_a_page_says_what_all_variants_override():
    assert ablate.changed("paper", 1.0) == ""
    assert ablate.changed("quick", 0.75) == (
        ", but with history_dropout 0.0, limit 9000, epochs_2 3, epochs_soft 0, epochs_3 2")


# --------------------------------------------------------------------------------------------------
# Verdicts, costs


@pytest.mark.parametrize("gaps, said", [
    ([1.0, 1.1, 0.9], "holds"), ([-1.0, -1.1, -0.9], "does not hold"),
    ([1.0, -1.0, 0.5], "within the spread"), ([0.0, 0.0], "within the spread"),
    ([0.5, 0.5], "holds"), ([3.0], "one seed, no spread"),
    ([1.0, 2.0, 3.0], "within the spread"),  # mean 2, standard error 0.58, t 4.30
    ([1.6, 2.0, 2.9], "holds"), ([1.0, 2.0], "within the spread"),  # mean 2.17, 0.38; 1.5, 0.5
    ([2.0] * 20 + [0.0] * 8, "holds"),  # mean 1.43, standard error 0.17, t 2
])
def test_verdicts_by_hand(gaps, said):
    assert ablate.verdict(gaps) == said


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_the_opposite_ordering_has_the_opposite_verdict(gaps):
    other = {"holds": "does not hold", "does not hold": "holds"}
    said = ablate.verdict(gaps)
    assert ablate.verdict([-gap for gap in gaps]) == other.get(said, said)


def test_orderings_of_errors_and_of_speeds():
    study = Study("", (), (), better=(("a", "b"),), faster=(("a", "b", 1.5),), gains=(("a", "b"),))
    found = {"a": {"test: MPJPE, mm": [40.0, 41.0, 40.5], "poses/s, batch 1": [31.0, 32.0, 31.5]},
             "b": {"test: MPJPE, mm": [45.0, 46.0, 45.4], "poses/s, batch 1": [20.0, 20.7, 20.3]},
             "a + HiPART": {"test: MPJPE, mm": [37.0, 38.5, 37.5]},  # 3.0, 2.5, 3.0 less
             "b + HiPART": {"test: MPJPE, mm": [43.5, 45.0, 44.0]}}  # 1.5, 1.0, 1.4 less
    errors, speeds, gains = ablate.verdicts(study, found)
    assert gains == ["a gains more than b", "test: MPJPE, mm", "+1.53", "holds"]
    assert errors == ["a before b", "test: MPJPE, mm", "+4.97", "holds"]
    assert speeds == ["a before b, by 50%", "poses/s, batch 1", "+1.00", "holds"]


def test_costs_are_those_of_a_count_by_hand():
    """Of one more block of GCSAB, in one step for each of 16 parts: parameters, and two FLOPs for
    every multiplication, those with the keys and values of all parts before included."""
    W = 128
    small, large = (ablate.costs(Variant("", (), dict(gcsab_blocks=n))) for n in (1, 2))
    more = {k: large[k][0] - small[k][0] for k in large}
    assert more["parameters, M"] * 1e6 == pytest.approx(12 * W * W + 13 * W)
    linear, attention = 16 * 2 * 12 * W * W, sum(2 * 2 * W * (i + 1) for i in range(16))
    assert more["FLOPs, G"] * 1e9 == pytest.approx(linear + attention)
