"""What the held-out loss says: its perplexity, and when to stop early because it has not fallen for a while."""

from __future__ import annotations

import math

from transformers import EarlyStoppingCallback

from recipe.train.run import Run


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # what a float can hold


class EarlyStop(EarlyStoppingCallback):
    """transformers' own, whose count goes into the trainer's state, and so into every checkpoint, at once.

    The held-out loss is the sum over all ranks, the same number on each: they decide alike. Evaluations before and
    after training do not count.
    """

    def __init__(self, run: Run, patience: int):
        super().__init__(early_stopping_patience=patience)
        self.run, self.training = run, False

    @property
    def reached(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training = True
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved:  # of the checkpoint that training goes on from
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        # A run that was killed between this decision and its end must not train on.
        control.should_training_stop = control.should_training_stop or self.reached
        return control

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.training:
            return control
        super().on_evaluate(args, state, control, metrics, **kwargs)
        state.stateful_callbacks[type(self).__name__] = self.state()
        if self.reached:
            control.should_save = True
            if state.is_world_process_zero:
                count = self.early_stopping_patience_counter
                self.run.event(
                    "early_stop",
                    f"step {state.global_step}: the held-out loss has not fallen below {state.best_metric:.4f} for "
                    f"{count} evaluation{'s' if count > 1 else ''} (train.early_stopping): training ends here",
                    step=state.global_step,
                    loss=metrics["eval_loss"],
                    best_loss=state.best_metric,
                    evaluations=count,
                )
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
