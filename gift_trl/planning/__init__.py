"""What a run will need: memory and time of its stages, from the shapes of the model alone."""

from gift_trl.planning.hardware import hardware_of
from gift_trl.planning.memory import TrainingSetup, training_memory
from gift_trl.planning.placement import Placement
from gift_trl.planning.stages import Batch, trace_training_step


__all__ = ["Batch", "Placement", "TrainingSetup", "hardware_of", "trace_training_step", "training_memory"]
