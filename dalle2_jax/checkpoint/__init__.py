"""What a trained stage on disk is, and reading and writing it.

    runs/NAME/STAGE/
        stage.json              what the stage is: module and fields, process, tokenizer, data, versions (`record`)
        checkpoints/<step>/     orbax: params, ema, optimizer, progress; extras.json; CHECKSUMS (`store`)
        samples/, metrics.jsonl, speed.jsonl, events...

The folder is self-contained: `load_stage` needs no config file and reads no optimizer state; `Run` knows the stages in
their order. orbax is imported when a checkpoint is read or written, not before.
"""

from dalle2_jax.checkpoint.describe import describe_stage
from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.checkpoint.rebuild import rebuild, to_json, with_defaults
from dalle2_jax.checkpoint.record import StageRecord, read_record, write_record
from dalle2_jax.checkpoint.run import Run, StageFolder
from dalle2_jax.checkpoint.stage import LoadedStage, load_params, load_stage
from dalle2_jax.checkpoint.store import CheckpointWriter, Restored, checkpoint_steps, load_shapes, restore_latest

__all__ = [
    "CheckpointError",
    "CheckpointWriter",
    "LoadedStage",
    "Restored",
    "Run",
    "StageFolder",
    "StageRecord",
    "checkpoint_steps",
    "describe_stage",
    "load_params",
    "load_shapes",
    "load_stage",
    "read_record",
    "rebuild",
    "restore_latest",
    "to_json",
    "with_defaults",
    "write_record",
]
