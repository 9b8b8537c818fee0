"""The parts of training that Detectron2 lacks: hooks, resuming, and the launch of processes."""
