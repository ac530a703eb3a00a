"""Checkpoints on the way and `checkpoint-best`, with lineage and manifest.

Of all weights, `checkpoint-best` is as complete as the base, with a vision tower for example; the others resume.
"""

import math
from pathlib import Path

import torch
from loguru import logger
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from medtune.models.lineage import Lineage
from medtune.models.whole_checkpoint import add_other_parts
from medtune.training.checkpoints import (
    BEST,
    UNFINISHED,
    delete_oldest,
    follow_schedule,
    put_in_place,
    recorded_attributes,
    run_settings,
    write_manifest,
)
from medtune.training.interruption import StopSignals
from medtune.training.precision import CPU_BF16, cpu_bf16_of, has_bfloat16_base
from medtune.training.processes import mean_of_processes, wait_for_all
from medtune.training.steps import data_settings, rows_of_a_batch


class CheckpointKeeper(TrainerCallback, ExportableState):
    """Completes Trainer's checkpoints, and keeps `checkpoint-best` by the evaluation loss.

    Every checkpoint records the lineage, the run's settings and the best evaluation so far.
    """

    def __init__(self, trainer: Trainer, lineage: Lineage, stop: "StopSignals", hub_options: dict | None = None):
        """hub_options: with which the base was loaded, for what else its checkpoint holds."""
        self.trainer = trainer
        self.lineage = lineage
        self.stop = stop
        self.hub_options = hub_options or {}
        self.best_loss: float | None = None
        self.best_step: int | None = None
        # The folder that Trainer, which writes file by file into the final place, is given as that of the run.
        trainer._get_output_dir = lambda trial: str(Path(trainer.args.output_dir, UNFINISHED))
        # Trainer asks for `state` before it has set them.
        trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.0), 0

    def state(self) -> dict:
        """What transformers writes into trainer_state.json for this callback."""
        settings = run_settings(self.trainer.args) | data_settings(self.trainer.train_dataset)
        settings[CPU_BF16] = cpu_bf16_of(self.trainer.args, has_bfloat16_base(self.trainer.model))
        progress = {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "evaluation_is_due": self.stop.evaluation_is_due,
            "n_longest_first": getattr(self.trainer, "n_longest_first", None) or rows_of_a_batch(self.trainer.args),
            # The losses since the last line of the log, which the next line is the mean of: `on_save` has them of all.
            "loss_sum": 0.0,
            "logged_step": self.trainer._globalstep_last_logged,
        }
        return {"args": {}, "attributes": settings | progress}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        recorded = recorded_attributes(state.stateful_callbacks)
        goes_on = 0 < state.global_step < state.max_steps
        if goes_on and (jump := follow_schedule(lr_scheduler, state.global_step, Path(args.output_dir))):
            logger.warning(jump)
        if Path(args.output_dir, BEST).is_dir():
            self.best_loss, self.best_step = recorded.get("best_loss"), recorded.get("best_step")
        self.trainer._tr_loss += recorded.get("loss_sum", 0.0)
        self.trainer._globalstep_last_logged = recorded.get("logged_step", state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = metrics["eval_loss"]
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, state.global_step
            self.save_best()

    def on_save(self, args, state, control, **kwargs):
        """Trainer has written all files of the checkpoint, in each process its own."""
        place = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # checkpoint-best is ours; with one of its own, Trainer deletes the newest checkpoint at the end for it.
        state.best_model_checkpoint = None
        loss_sum = mean_of_processes(self.trainer._tr_loss, args)  # waits for all processes
        if args.should_save:
            recorded_attributes(state.stateful_callbacks)["loss_sum"] = loss_sum
            partial = place.parent / UNFINISHED / place.name
            self.lineage.save(partial)
            state.save_to_json(str(partial / "trainer_state.json"))
            write_manifest(partial)
            put_in_place(place)
            delete_oldest(place, args.save_total_limit)
        wait_for_all()

    def save_best(self) -> None:
        best = Path(self.trainer.args.output_dir, BEST)
        self.trainer.save_model(str(best.parent / UNFINISHED / BEST))
        if self.trainer.args.should_save:
            partial = best.parent / UNFINISHED / BEST
            self.lineage.save(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)
            model = self.trainer.model
            if not isinstance(model, PeftModel) and model.can_generate():
                add_other_parts(partial, model, self.lineage.base_model, **self.hub_options)
            put_in_place(best)
        wait_for_all()
