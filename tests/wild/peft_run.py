# SPDX-License-Identifier: Apache-2.0
"""A training with google-tunix's `PeftTrainer`, unedited, of a small model; run as a program it prints its steps.

python -m tests.wild.peft_run FOLDER STEPS {full,lora}
"""

import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import ckpttools as ct

BATCH, SEQ, VOCABULARY = 2, 6, 32
CONFIG = llama3.ModelConfig(
    num_layers=2,
    embed_dim=8,
    hidden_dim=16,
    num_heads=4,
    head_dim=4,
    num_kv_heads=2,
    vocab_size=VOCABULARY,
    rope_theta=10_000,
    norm_eps=1e-6,
)


def spec_of(folder: Any, every: int = 2) -> ct.CheckpointSpec:
    return ct.CheckpointSpec(directory=folder, save=ct.EverySteps(every), keep=ct.All())


def model_input(example: TrainingInput) -> dict[str, Any]:
    positions = jnp.broadcast_to(jnp.arange(SEQ), (BATCH, SEQ))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((SEQ, SEQ), bool)), (BATCH, SEQ, SEQ))
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": positions,
        "attention_mask": mask,
    }


def batches(count: int) -> list[TrainingInput]:
    rng = np.random.default_rng(0)
    return [
        TrainingInput(
            input_tokens=rng.integers(0, VOCABULARY, (BATCH, SEQ)).astype(np.int32),
            input_mask=np.ones((BATCH, SEQ), np.int32),
        )
        for _ in range(count)
    ]


def make_model(*, lora: bool) -> nnx.Module:
    model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
    if not lora:
        return model
    inputs = model_input(batches(1)[0])
    return qwix.apply_lora_to_model(
        model,
        qwix.LoraProvider(module_path=".*(q_proj|kv_proj|gate_proj)", rank=2, alpha=2.0),
        inputs["input_tokens"],
        inputs["positions"],
        None,
        inputs["attention_mask"],
        rngs=nnx.Rngs(1),
    )


def make_trainer(trainer_class: type, *, steps: int, lora: bool = False, **config: Any) -> PeftTrainer:
    settings = TrainingConfig(eval_every_n_steps=1000, max_steps=steps, **config)
    trainer = trainer_class(make_model(lora=lora), optax.adamw(1e-2), settings)
    return trainer.with_gen_model_input_fn(model_input)


class Told:
    """Hooks of tunix that print each step once it is complete, for whoever wants to kill the process there."""

    def on_train_step_start(self, trainer: PeftTrainer) -> None:
        print(trainer.train_steps, flush=True)
        time.sleep(0.05)  # So that the signal comes before many more steps.

    def on_train_start(self, trainer: PeftTrainer) -> None: ...

    def on_train_end(self, trainer: PeftTrainer) -> None: ...

    def on_train_step_end(self, *args: Any) -> None: ...


def main() -> None:
    folder, steps, kind = sys.argv[1:]
    trainer = make_trainer(ct.peft_trainer(PeftTrainer, spec_of(folder)), steps=int(steps), lora=kind == "lora")
    trainer.with_training_hooks(Told())
    trainer.train(batches(int(steps)))


if __name__ == "__main__":
    main()
