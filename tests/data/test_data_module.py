import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from tealightning.data import PromptDataModule


class Recorder(pl.LightningModule):
    """Trains one number and records which prompts it is shown."""

    def __init__(self, tokenizer=None, *, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tokenizer
        self.fail_at = fail_at
        self.seen: list[list[str]] = []
        self.seen_val: list[str] = []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(batch.ids)
        self.manual_backward(self.weight**2)
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.seen_val += batch.ids

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write_prompts(path: Path, n: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(n)))
    return str(path)


@pytest.fixture
def tokenizer(playground: Path):
    return AutoTokenizer.from_pretrained(playground / "policy")


def fit(
    data: PromptDataModule, module: Recorder, folder: Path, *, ckpt_path=None, callbacks=(), **settings
) -> Recorder:
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


SETTINGS = {  # 14 prompts, 3 a step: 4 steps an epoch
    "plain": {},
    "with validation inside the epoch": {"val_check_interval": 2},
    "with short epochs": {"limit_train_batches": 3},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_run_sees_the_prompts_of_an_uninterrupted_one(tmp_path: Path, tokenizer, case):
    settings = {"max_epochs": 3} | SETTINGS[case]

    def data() -> PromptDataModule:
        val = write_prompts(tmp_path / "val.jsonl", 2)
        return PromptDataModule(train=write_prompts(tmp_path / "train.jsonl", 14), val=val, batch_size=3)

    every_step = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(data(), Recorder(tokenizer), tmp_path, callbacks=[every_step], **settings).seen
    assert len(whole) == (9 if case == "with short epochs" else 12)
    assert whole[:4] != whole[4:8]
    for step in range(1, len(whole)):
        resumed = Recorder(tokenizer)
        fit(data(), resumed, tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        assert whole[:step] + resumed.seen == whole, f"resumed after step {step}"


def test_run_that_died_resumes_from_its_last_checkpoint(tmp_path: Path, tokenizer):
    def data() -> PromptDataModule:
        return PromptDataModule(train=write_prompts(tmp_path / "train.jsonl", 14), batch_size=3)

    whole = fit(data(), Recorder(tokenizer), tmp_path, max_steps=10).seen
    last = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=2)
    died = Recorder(tokenizer, fail_at=7)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(data(), died, tmp_path, callbacks=[last], max_steps=10)
    resumed = fit(data(), Recorder(tokenizer), tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=10)
    assert died.seen[:6] + resumed.seen == whole
    assert len(whole) == 10


@pytest.mark.parametrize("after", ["training", "validation"])
def test_checkpoint_at_the_end_of_an_epoch_starts_the_next(tmp_path: Path, tokenizer, after):
    def data() -> PromptDataModule:
        path = write_prompts(tmp_path / "train.jsonl", 14)
        return PromptDataModule(train=path, val=f"{path}@[:2]", batch_size=3)

    at_end = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=after == "training", save_top_k=-1)
    whole = fit(data(), Recorder(tokenizer), tmp_path, callbacks=[at_end], max_epochs=3).seen
    assert len(whole) == 12
    for epoch in range(2):
        resumed = fit(data(), Recorder(tokenizer), tmp_path, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=3)
        assert resumed.seen == whole[4 * (epoch + 1) :]


def test_resume_with_other_prompts_is_refused(tmp_path: Path, tokenizer):
    train = write_prompts(tmp_path / "train.jsonl", 14)
    last = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=2)
    fit(PromptDataModule(train=train, batch_size=3), Recorder(tokenizer), tmp_path, callbacks=[last], max_steps=2)
    write_prompts(tmp_path / "train.jsonl", 15)
    with pytest.raises(ValueError, match=r"prompts \(was 14, now 15\)"):
        data = PromptDataModule(train=train, batch_size=3)
        fit(data, Recorder(tokenizer), tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=4)


def test_checkpoint_of_a_training_is_evaluated_without_its_prompts(tmp_path: Path, tokenizer):
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    trained = PromptDataModule(train=prompts, test=prompts, batch_size=2, tokenizer=tokenizer)
    trained.setup("fit")
    trained.train_dataloader()
    state = trained.state_dict()
    assert "train" in state
    evaluated = PromptDataModule(train=prompts, test=prompts, batch_size=2, tokenizer=tokenizer)
    evaluated.setup("test")
    evaluated.load_state_dict(state)
    assert sum(len(batch.ids) for batch in evaluated.test_dataloader()) == 4


def test_reloading_loaders_each_epoch_continues_the_stream(tmp_path: Path, tokenizer):
    def seen(**settings) -> list[list[str]]:
        data = PromptDataModule(train=write_prompts(tmp_path / "train.jsonl", 14), batch_size=3)
        return fit(data, Recorder(tokenizer), tmp_path, max_epochs=2, **settings).seen

    assert seen(reload_dataloaders_every_n_epochs=1) == seen()


def test_validation_and_test_see_every_prompt_in_order(tmp_path: Path, tokenizer):
    path = write_prompts(tmp_path / "p.jsonl", 5)
    data = PromptDataModule(val=path, test=f"{path}@[3:]", val_batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module = Recorder(tokenizer)
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.seen_val == ["0", "1", "2", "3", "4"]
    trainer.test(module, datamodule=data, verbose=False)
    assert module.seen_val[5:] == ["0", "1"]


def test_settings_reach_prompts_and_loaders(tmp_path: Path, playground: Path, tokenizer):
    rows = [{"question": q, "key": q[:3]} for q in ("one", "two " * 9, "three")]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['role'] }}={{ m['content'] }} {% endfor %}")
    data = PromptDataModule(
        train=str(tmp_path / "q.json"),
        prompt_column="question",
        id_column="key",
        system_prompt="S",
        chat_template=str(tmp_path / "chat.jinja"),
        tokenizer=str(playground / "policy"),
        batch_size=1,
        max_prompt_tokens=25,
        seed=4,
    )
    with pytest.warns(UserWarning, match="dropped 1 of 3"):
        data.setup("fit")
    loader = data.train_dataloader()
    batches = {batch.ids[0]: batch for batch in loader}
    assert set(batches) == {"one", "thr"}
    assert tokenizer.decode(batches["one"].token_ids[0]) == "system=S user=one "
    assert batches["thr"].prompts == ["three"]
    assert loader.seed == 4
    assert data.val_dataloader() == []


def test_tokenizer_object_may_be_assigned(tmp_path: Path, tokenizer):
    data = PromptDataModule(test=write_prompts(tmp_path / "p.jsonl", 2))
    data.tokenizer = tokenizer
    data.setup()
    (batch,) = data.test_dataloader()
    assert batch.token_ids[0] == tokenizer("prompt 0")["input_ids"]


@pytest.mark.parametrize("name", ["batch_size", "val_batch_size", "max_prompt_tokens"])
def test_numbers_below_one_are_errors(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PromptDataModule(**{name: 0})


@pytest.mark.parametrize(("stage", "name"), [("fit", "train"), ("validate", "val"), ("test", "test")])
def test_stage_without_a_source_is_an_error(stage, name, tokenizer):
    data = PromptDataModule()
    data.tokenizer = tokenizer
    with pytest.raises(ValueError, match=rf"data\.{name} is not set"):
        data.setup(stage)


def test_no_tokenizer_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"set data\.tokenizer"):
        PromptDataModule(train=write_prompts(tmp_path / "p.jsonl", 2)).setup("fit")
    with pytest.raises(ValueError, match=r"set data\.tokenizer"):
        fit(PromptDataModule(train=write_prompts(tmp_path / "p.jsonl", 8)), Recorder(), tmp_path, max_steps=1)


def test_tokenizer_that_is_not_there_is_an_error(tmp_path: Path):
    data = PromptDataModule(train=write_prompts(tmp_path / "p.jsonl", 8), tokenizer=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"data\.tokenizer .*none"):
        data.setup("fit")


def test_each_rank_gets_its_share(tmp_path: Path, tokenizer):
    data = PromptDataModule(train=write_prompts(tmp_path / "p.jsonl", 12), val=str(tmp_path / "p.jsonl"), batch_size=3)
    data.tokenizer = tokenizer
    data.trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path)
    data.setup("fit")
    assert (data.train_dataloader().rank, data.train_dataloader().world_size) == (0, 2)
    assert len(data.train_dataloader()) == 2  # steps of 2 x 3 prompts
    assert [batch.ids for batch in data.val_dataloader()] == [["0", "2", "4"], ["6", "8", "10"]]
