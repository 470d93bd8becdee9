"""Feed every reader with mutated files: each must be read, or refused in one sentence.

    python benchmarks/fuzz.py                                    # all readers, 2,000 files each
    python benchmarks/fuzz.py --reader bvh smpl --files 200 --seed 1
    python benchmarks/fuzz.py --reader bvh --seed 1 --only 137   # one file again, its traceback

A reader comes with small, made-up files of every kind that it reads (fuzz_readers.py). Each file
that it is given has a few changes (fuzz_mutations.py). Some name code that would leave a mark, some
ask for much memory or time, some are no files at all. A process of its own reads them, with at most
6 GB, and 20 s of a processor for each. Anything but success or one plain sentence is a fault, as is
any write outside of the file's folder. Exit status 1 if there is a fault.
"""

import argparse
import faulthandler
import io
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

import torch  # noqa: E402
from fuzz_mutations import MARK, SECRET, WORK, replace  # noqa: E402
from fuzz_readers import READERS, ROOT  # noqa: E402

MEMORY, SECONDS = 6 << 30, 20  # of the process that reads, and of a processor for a file
WAIT = 180  # s that a file may take in all, since other processes may be at work, too
SLOW, LARGE = 5, 1 << 30  # s and bytes: a file that is refused should take less
LONGEST = 600  # characters of a message


# --------------------------------------------------------------------------------------------------
# The process that reads

RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
          "os.chmod", "shutil.rmtree", "shutil.move"}  # fmt: skip
reading = {"in": None, "did": []}  # the case that is read, and what is done that may not be


def watch(event, args):
    """An audit hook that notes whatever runs something, or writes outside of the case."""
    if reading["in"] is None:
        return
    writes = event in WRITES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    full = os.path.realpath if event == "open" else os.path.abspath  # of a link, or where it leads
    paths = [f"{full(os.fsdecode(a))}/" for a in args[: 1 if event == "open" else 2]
             if writes and isinstance(a, str | bytes | Path)]
    if event in RUNS or not all(path.startswith(f"{reading['in']}/") for path in paths):
        reading["did"].append(f"it does {event} {args}"[:200])


def memory(key):
    """A line of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def serve(read, errors, case, pipe, log):
    """Read one file after another of the pipe, and send back what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable(log)
    faulthandler.register(signal.SIGXCPU, log, chain=True)  # which then ends the process
    sys.addaudithook(watch)
    while True:
        pipe.send(attempt(read, errors, case, pipe.recv(), log))


def attempt(read, errors, case, file, log):
    """Read a file -> what came of it, as a dict."""
    os.chdir(case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory counts from here
    before, began, error, out = memory("VmRSS"), time.process_time(), None, io.StringIO()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(began) + SECONDS, resource.RLIM_INFINITY))
    faulthandler.dump_traceback_later(WAIT, exit=True, file=log)
    reading.update({"in": case, "did": []})
    with redirect_stdout(out), redirect_stderr(io.StringIO()) as err:
        try:
            read(file)
        except BaseException as e:
            error = e
    reading["in"] = None
    faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - began, memory("VmHWM") - before
    stopped, printed = isinstance(error, SystemExit) and error.code == 2, out.getvalue()
    said = err.getvalue().strip() if stopped else str(error or "")
    stack = [f for f in traceback.extract_tb(error and error.__traceback__)
             if ROOT in Path(f.filename).parents and "benchmarks" not in f.filename]
    refused = stopped or isinstance(error, errors)
    faults = [why for why, so in {
        f"{type(error).__name__}, and no sentence": error and not refused,
        "a refusal of no or several lines": refused and len(said.splitlines()) != 1,
        "control characters in a message": refused and not said.isprintable(),
        f"a message of more than {LONGEST} characters": len(said) > LONGEST,
        "a memory error": re.search("MemoryError|[Aa]llocat", said),
        "another file is shown": "SECRET" in said + printed,
        "control characters are printed": not printed.replace("\n", "").isprintable(),
        "WHAT A FILE SAYS IS EXECUTED": MARK.exists(),
    }.items() if so]  # fmt: skip
    notes = [why for why, so in {
        f"more than {SLOW} s": seconds > SLOW, f"more than {LARGE >> 30} GB": grown > LARGE,
        "Python's own words": re.search(r"\w+Error\b|\[Errno|argument", said),
    }.items() if refused and so]  # fmt: skip
    MARK.unlink(missing_ok=True)
    return dict(
        kind="read" if error is None else "refused", faults=faults + reading["did"], notes=notes,
        where=" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack[:-4:-1]),
        said=said or (type(error).__name__ if error else ""), seconds=seconds, grown=grown,
        trace="".join(traceback.format_exception(error)) if error else "")


class Reader:
    """A reader, its good files, and a process in which it reads."""

    def __init__(self, name, seed):
        self.name, self.seed, self.process = name, seed, None
        make, pattern, self.errors = READERS[name]
        self.folder, self.case = WORK / name, WORK / "case" / name
        self.folder.mkdir()
        with redirect_stdout(io.StringIO()):
            self.read = make(self.folder)
        self.cases = [[f for f in sorted(case.rglob(pattern)) if f.is_file()]
                      for case in sorted(self.folder.iterdir())]

    def mutate(self, number):
        """File `number` in a fresh copy of its case -> its path, and the good file that it was.

        A number below 0 leaves the first file of a case as it is.
        """
        rng = random.Random(f"{self.seed} {self.name} {number}")
        files = rng.choice(self.cases) if number >= 0 else self.cases[number]
        suffix = rng.choice(sorted({f.suffix for f in files}))
        good = rng.choice([f for f in files if f.suffix == suffix])
        case = self.folder / good.relative_to(self.folder).parts[0]
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(case, self.case)
        file = self.case / good.relative_to(case)
        if number >= 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an archive may have a name twice
                file = replace(rng, file, [f for of in self.cases for f in of])
        return file, good

    def attempt(self, file):
        """What came of a file, even if it was the end of the process."""
        if self.process is None:
            self.log, context = open(WORK / "log", "w+"), multiprocessing.get_context("fork")
            self.pipe, theirs = context.Pipe()
            job = (self.read, self.errors, self.case, theirs, self.log)
            self.process = context.Process(target=serve, args=job, daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(file)
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            trace = Path(self.log.name).read_text()
            slow = "Timeout" in trace or self.process.exitcode == -signal.SIGXCPU
            why = (f"more than {SECONDS} s" if slow
                   else f"the process died ({self.process.exitcode})")
            where = re.findall(rf'File "{ROOT}/(?!bench)(.*?)", line (\d+) in (\w+)', trace)
            where = " < ".join(f"{name}:{line} {function}" for name, line, function in where[:3])
            self.process = None
            return dict(kind="died", faults=[why], notes=[], where=where, said="", trace=trace,
                        seconds=SECONDS, grown=0)


def shown(text, most=300):
    return ascii(text)[1:-1][:most]


def run(name, seed, files, keep):
    """Feed a reader, and print what was found -> its row of the table, and how many faults."""
    reader, counts, seconds, grown = Reader(name, seed), defaultdict(int), 0, 0
    found = defaultdict(list)  # (fault or note, what) -> the files
    for number in [*range(-len(reader.cases), 0), *range(files)]:
        file, good = reader.mutate(number)
        result = reader.attempt(file)
        if number < 0:
            if result["kind"] != "read":
                print(f"{name}: the good {good.name} is {result['kind']}: {shown(result['said'])}")
            continue
        counts["fault" if result["faults"] else result["kind"]] += 1
        seconds, grown = max(seconds, result["seconds"]), max(grown, result["grown"])
        for key in ("faults", "notes"):
            for what in result[key]:
                found[key, f"{what}: {result['where']}"].append((number, good.name, result["said"]))
        if result["faults"] and file.is_file() and not file.is_symlink():
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, keep / f"{name}_{seed}_{number}_{good.name}")
    if reader.process:
        reader.process.kill()
    for (key, what), of in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        number, example, said = of[0]
        print(f"{key}, {name}, {len(of)} files: {shown(what)}\n"
              f"    --only {number} ({example}): {shown(said)}")
    return (f"| {name} | {files} | {counts['read']} | {counts['refused']} | {counts['fault']} | "
            f"{seconds:.1f} s | {grown >> 20} MB |"), counts["fault"]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--reader", choices=READERS, nargs="+", default=list(READERS))
    p.add_argument("--files", type=int, default=2000, help="mutated files for each reader")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="the number of one file")
    p.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "fuzz"),
                   help="where files that show a fault are kept")
    args = p.parse_args()
    keep, faults = args.keep.resolve(), 0
    torch.set_num_threads(1)
    SECRET.write_text("SECRET of another file\n")
    try:
        if args.only is not None:
            reader = Reader(args.reader[0], args.seed)
            file, good = reader.mutate(args.only)
            for key, value in reader.attempt(file).items():
                print(f"{key}: {value if key == 'trace' else shown(str(value), 2000)}")
            return
        rows = ["| reader | files | read | refused | faults | slowest | most memory |",
                "| --- | --- | --- | --- | --- | --- | --- |"]
        for name in args.reader:
            row, n = run(name, args.seed, args.files, keep)
            rows, faults = [*rows, row], faults + n
            print(row, flush=True)
        print("", *rows, sep="\n")
    finally:
        os.chdir(ROOT)
        shutil.rmtree(WORK, ignore_errors=True)
    if faults:
        print(f"{faults} faults: the files are in {keep}")
        sys.exit(1)


if __name__ == "__main__":
    main()
