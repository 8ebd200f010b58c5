"""One run of transformers' Trainer: two learning rates, checkpoints that survive kill -9."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from coldmerge.core.errors import DataError
from coldmerge.core.files import fsync_path
from coldmerge.core.progress import Progress
from coldmerge_client.files import write_atomic
from coldmerge_client.training import models, sam
from coldmerge_client.training.config import TrainConfig

COMPLETE = "coldmerge-complete"
"""A file that is written into a checkpoint after everything else in it is on the disk."""


def fit(
    model: Any,
    examples: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    head: Sequence[torch.Tensor],
    config: TrainConfig,
    seed: int,
    folder: Path,
    progress: Progress,
) -> dict[str, float]:
    """Train `model` in place, resuming from the last complete checkpoint in `folder`.

    `head` are the parameters that learn at the head's rate. Returns steps and loss.

    Raises:
        DataError: the loss is not finite.
    """
    trainer = _Trainer(
        head,
        config,
        model=model,
        args=_arguments(config, seed, folder),
        train_dataset=list(examples),
        data_collator=collate,
        callbacks=[_Steps(config.checkpoint_minutes, progress)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with models.quiet():
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    loss = float(result.training_loss)
    if not torch.isfinite(torch.tensor(loss)):
        raise DataError(
            "training.diverged",
            "Training diverged: the loss is not a number any more.",
            got=f"loss {loss}",
            hint="Lower `lr` in the training configuration.",
        )
    return {"steps": float(result.global_step), "train_loss": loss}


def _arguments(config: TrainConfig, seed: int, folder: Path) -> Any:
    where = models.device(config)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        seed=seed,
        data_seed=seed,
        bf16=models.use_bf16(config, where),
        use_cpu=where.type == "cpu",
        dataloader_pin_memory=where.type != "cpu",
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )


class _Trainer(transformers.Trainer):
    """transformers' Trainer, with a learning rate of its own for the head, and SAM."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, head: Sequence[torch.Tensor], config: TrainConfig, **settings: Any) -> None:
        self._head = {id(parameter) for parameter in head}
        self._config = config
        self._passed: list[tuple[dict[str, Any], sam.Chance]] = []
        super().__init__(**settings)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Loss and gradients of a batch; with SAM, those of the update's batches further on.

        SAM's ascent needs the gradient of all batches that are summed into one update, so
        the second pass over all of them follows on the last one's first.
        """
        if self._config.sam is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._passed.append((dict(inputs), sam.Chance(self.args.device)))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            passed, self._passed = self._passed, []
            trained = [each for each in model.parameters() if each.requires_grad]
            with sam.ahead(trained, self._config.sam.rho):
                for batch, chance in passed:
                    chance.again()
                    super().training_step(model, batch, num_items_in_batch)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over what is trained; biases and norms do not decay."""
        if self.optimizer is None:
            config = self._config
            groups: dict[tuple[bool, bool], list[torch.Tensor]] = {}
            for parameter in (model or self.model).parameters():
                if parameter.requires_grad:
                    key = (id(parameter) in self._head, parameter.ndim > 1)
                    groups.setdefault(key, []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": group,
                        "lr": config.head_rate if is_head else config.lr,
                        "weight_decay": config.weight_decay if decays else 0.0,
                    }
                    for (is_head, decays), group in sorted(groups.items(), key=lambda item: item[0])
                ]
            )
        return self.optimizer


class _Steps(transformers.TrainerCallback):
    """Reports steps, asks for a checkpoint now and then, and marks it when it is whole."""

    def __init__(self, minutes: float | None, progress: Progress) -> None:
        self._minutes = minutes
        self._progress = progress
        self._last = time.monotonic()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The time to the first checkpoint counts from here."""
        self._last = time.monotonic()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step; save if it is time, but not after the last one."""
        self._progress("train", state.global_step, state.max_steps)
        due = self._minutes is not None and time.monotonic() - self._last >= 60 * self._minutes
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Everything to the disk first, then the mark."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in sorted(folder.iterdir()):
            fsync_path(path)
        write_atomic(folder / COMPLETE, b"")
        fsync_path(folder.parent)
        self._last = time.monotonic()


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; what a crash left half-written is removed."""
    complete: dict[int, Path] = {}
    for path in sorted(folder.glob("checkpoint-*")):
        if (path / COMPLETE).exists():
            complete[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return str(complete[max(complete)]) if complete else None
