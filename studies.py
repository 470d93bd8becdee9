"""The paper's ablations as a table of variants: what each overrides, and what the paper found.

    STUDIES["table 3"].variants[1].options("quick")     # its Config and its Training

ablate.py trains and compares them. To add a table is to add an entry to STUDIES.
"""

import math
from dataclasses import dataclass, field, replace

from hipart import GENERATIONS, Config
from train import LIFTER_SIZES, PRESETS, Training

# What all variants of a preset override: what goes beyond the paper and blurs what histories are
# worth. And `quick` has fewer epochs, so that a table with three seeds takes an hour on two cores.
BASE = {name: (dict(history_dropout=0.0), dict(epochs_soft=0)) for name in PRESETS}
BASE["quick"][1].update(epochs_2=3, epochs_3=2)


@dataclass(frozen=True)
class Variant:
    """A row. paper: its numbers there, in the columns of the study. scale: options as multiples of
    the preset's. lacks: why we have no such row."""

    name: str
    paper: tuple[str, ...]
    config: dict = field(default_factory=dict)
    scale: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    input: str = "generated"
    lacks: str = ""

    def options(self, preset: str, share: float = 1.0) -> tuple[Config, Training]:
        """Of a preset, with this share of its training samples if it has a limit."""
        config, training = (of | base for of, base in zip(PRESETS[preset], BASE[preset],
                                                          strict=True))
        training |= LIFTER_SIZES[preset].get(self.training.get("lifter"), {})
        size = vars(Config(**config))
        scaled = {k: max(1, math.floor(size[k] * by + 0.5)) for k, by in self.scale.items()}
        limit = dict(limit=round(training.get("limit", 0) * share))
        return (Config(**config | scaled | self.config),
                Training(**training | limit | self.training))


@dataclass(frozen=True)
class Study:
    """A table or figure. paper: the columns of its numbers there. better: pairs of variants of
    which the first has the smaller error in the paper, or should have by what it says.
    faster: (a, b, times). gains: pairs of which the first gains more by HiPART."""

    title: str
    paper: tuple[str, ...]
    variants: tuple[Variant, ...]
    better: tuple[tuple[str, str], ...] = ()
    faster: tuple[tuple[str, str, float], ...] = ()
    gains: tuple[tuple[str, str], ...] = ()
    trains: bool = True
    data: str = "data/demo"
    prepare: str = "python prepare_data.py"  # makes it
    share: float = 1.0  # of the samples of a preset that has a limit
    batches: tuple[int, ...] = ()  # at which speed is measured
    costs: bool = False  # parameters and FLOPs at the paper's sizes
    axes: tuple[str, ...] = ()  # of a figure: the options along its axes
    note: str = ""

    def without_third_level(self) -> "Study":
        """The same where the data or the lifter have no 192 points."""
        return replace(self, variants=tuple(
            replace(v, lacks=NO_192) if "192" in v.training.get("levels", "") else v
            for v in self.variants))


def sizes(name: str, blocks_1: int, blocks_2: int, width: int, *paper: str) -> Variant:
    """A row of Table 9."""
    of = dict(encoder_blocks=blocks_1 / 4, gcsab_blocks=blocks_2 / 12, encoder_width=width / 128,
              width=width / 128)
    return Variant(name, paper, scale={k: by for k, by in of.items() if by != 1})


def lifter(name: str, before: str, after: str, **training) -> tuple[Variant, ...]:
    """Rows of Tables 6 and 10: a lifter alone, with HiPART, and with true points."""
    return (Variant(name, (before,), training=training, input="sparse"),
            Variant(name + WITH, (after,), training=training),
            Variant(f"{name} + ground truth", ("-",), training=training, input="ground_truth"))


WITH = " + HiPART"
TABLE_6 = ("spatial", "PoseFormer, 27 frames", "MixSTE, 27 frames")
TABLE_10 = ("1 frame", "9 frames", "27 frames", "81 frames")
TWO_LEVELS = "not made: the tokenizer has two levels"
NO_192 = "not made: it takes an MLP as lifter, and a data set with x_192"
FRAMES = "not made: few sequences are as long"
SEQUENCES = dict(share=0.5, data="data/sequences", prepare="python prepare_data.py --sequences")
OF_SEQUENCES = ("A limit of samples leaves whole sequences to the lifters of sequences, and single "
                "frames of all sequences to the spatial one: compare gains. On test, sequences "
                "have 13 frames at most, so longer windows repeat frames. LIFTER_SIZES in train.py "
                "has the sizes of the lifters and how long they train. ")
H36M = "paper: MPJPE, mm"
FPS = "paper: FPS on a V100"
STUDIES = {
    "table 3": Study("components of the tokenizer", (H36M, "paper: 3DPW, mm"), (
        Variant("HiPART", ("42.0", "77.2")),
        Variant("one codebook for both levels", ("45.3", "81.5"), dict(shared_codebook=True)),
        Variant("without L_local", ("43.6", "80.2"), dict(lambda_l=0.0)),
        Variant("without L_global", ("42.4", "78.9"), dict(lambda_g=0.0)),
    ), tuple(("HiPART", other) for other in (
        "one codebook for both levels", "without L_local", "without L_global"))),
    "table 4": Study("ways to generate", (H36M, "paper: 3DPW, mm", FPS), tuple(
        Variant(name, paper, dict(generation=name)) for name, paper in zip(GENERATIONS, (
            ("42.0", "77.2", "396"), ("43.1", "79.3", "396"), ("42.5", "78.4", "265"),
            ("43.6", "80.2", "265"), ("46.3", "81.9", "432")), strict=True)
    ), (("both", "centre-to-periphery"), ("both", "sparse-to-dense"),
        ("centre-to-periphery", "next-token"), ("sparse-to-dense", "next-token"),
        ("next-token", "classification")),
        (("sparse-to-dense", "next-token", 1.49),), batches=(1, 64),
        note="Next-token takes joints in the order of their numbers, centre-to-periphery from the "
             "centre of the body outwards; both take 64 steps. Sparse-to-dense is HiPART with the "
             "joints in the order of their numbers. Classification has no past to see. "),
    "table 5": Study("levels that the lifter sees", (H36M,), (
        Variant("none", ("52.1",), input="sparse"),
        Variant("48", ("46.7",), training=dict(levels="dense")),
        Variant("96", ("43.2",), training=dict(levels="fine")),
        Variant("192", ("42.7",), lacks=TWO_LEVELS),
        Variant("48 + 96", ("42.0",)),
        Variant("48 + 96 + 192", ("41.4",), lacks=TWO_LEVELS),
        Variant("48, ground truth", ("-",), training=dict(levels="dense"), input="ground_truth"),
        Variant("96, ground truth", ("-",), training=dict(levels="fine"), input="ground_truth"),
        Variant("48 + 96, ground truth", ("-",), input="ground_truth"),
        Variant("192, ground truth", ("-",), training=dict(levels="192"), input="ground_truth"),
        Variant("48 + 96 + 192, ground truth", ("-",), training=dict(levels="dense+fine+192"),
                input="ground_truth"),
    ), (("48", "none"), ("96", "48"), ("48 + 96", "96"),
        ("48 + 96 + 192, ground truth", "48 + 96, ground truth")),
        note="The last ordering is the paper's of generated points, here of true ones. "),
    "table 6": Study("lifters without and with HiPART", (H36M,), (
        *lifter("spatial", "52.1", "42.0", lifter="spatial"),
        *lifter("PoseFormer, 27 frames", "44.3 (81)", "40.8 (81)", lifter="poseformer", frames=27),
        *lifter("MixSTE, 27 frames", "42.4 (81)", "39.3 (81)", lifter="mixste", frames=27),
    ), tuple((name + WITH, name) for name in TABLE_6), gains=tuple(
        ("spatial", name) for name in TABLE_6[1:]), **SEQUENCES,
        note=f"A lifter sees as many samples with HiPART as without. {OF_SEQUENCES}"),
    "table 8": Study("speed of generation and lifting", (FPS, H36M), (
        Variant("spatial lifter with HiPART", ("396", "42.0")),
        Variant("MixSTE (81 frames) with HiPART", ("681", "39.3"), lacks="not made: one frame"),
        Variant("DiffPose", ("173", "49.7"), lacks="another method"),
        Variant("DiffuPose", ("188", "49.4"), lacks="another method"),
    ), trains=False, batches=(1, 8, 64, 512),
        note="Weights are random, and the lifter is the preset's. The paper has no orderings of "
             "ours to test. "),
    "table 9": Study("depth and width", ("paper: parameters, M", "paper: FLOPs, G", H36M), (
        sizes("4/12/128", 4, 12, 128, "2.4", "2.24", "42.0"),
        sizes("2/6/128", 2, 6, 128, "1.8", "1.41", "44.1"),
        sizes("3/8/128", 3, 8, 128, "2.1", "1.82", "43.5"),
        sizes("5/16/128", 5, 16, 128, "2.7", "2.65", "42.2"),
        sizes("4/12/96", 4, 12, 96, "2.0", "1.77", "43.9"),
        sizes("4/12/256", 4, 12, 256, "3.6", "4.14", "42.5"),
    ), tuple(("4/12/128", other) for other in (
        "2/6/128", "3/8/128", "5/16/128", "4/12/96", "4/12/256")), share=0.75, costs=True,
        note="Blocks of the encoders, blocks of GCSAB, and the width of both. Parameters and FLOPs "
             "are of all three stages at these sizes, for one pose; a multiplication with its "
             "addition counts as two. Errors are of models in proportion to the preset's, with "
             "whole blocks: where it has few, two rows may have equally many. "),
    "table 10": Study("lifters of more and more frames, without and with HiPART", (H36M,), (
        *lifter("1 frame", "51.1", "42.0", lifter="spatial")[:2],
        *lifter("9 frames", "-", "-", lifter="mixste", frames=9, batch_3=9)[:2],
        *lifter("27 frames", "-", "-", lifter="mixste", frames=27)[:2],
        *lifter("81 frames", "42.4", "39.3", lifter="mixste", frames=81, batch_3=1)[:2],
        Variant("243 frames", ("40.9",), lacks=FRAMES),
        Variant("243 frames + HiPART", ("36.7",), lacks=FRAMES),
    ), tuple((name + WITH, name) for name in TABLE_10), gains=tuple(
        ("1 frame", name) for name in TABLE_10[1:]), **SEQUENCES,
        note="A single frame is lifted by the spatial transformer (in the paper by MixSTE), and "
             "more frames by MixSTE, in as many steps of as many frames. The paper has 1 and 243 "
             f"frames, and in its Table 6 there are 81; 9 and 27 are ours. {OF_SEQUENCES}"),
    "figure 5": Study("width and size of the codebooks", (), (
        Variant("base", ()),
        *(Variant(f"{name} x {by:g}", (), scale={name: by})
          for name, factors in (("D", (0.25, 2)), ("K_s", (0.25, 2)), ("K_d", (0.25, 1.5, 2)))
          for by in factors),
    ), (("base", "D x 0.25"), ("base", "K_s x 0.25"), ("base", "K_s x 2"), ("base", "K_d x 0.25"),
        ("K_d x 1.5", "base"), ("K_d x 1.5", "K_d x 2")), share=0.75, axes=("D", "K_s", "K_d"),
        note="The paper has D = 32 to 256 and 512 to 4096 codes, and is best at 128, at 2048 "
             "sparse and at 3072 dense codes; here are multiples of the preset's sizes, over "
             "the same range, and D is that of both codebooks. "),
}  # fmt: skip
