from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

# 118,287 images of COCO train2017 in batches of 16.
COCO_EPOCH = 7392


def step_schedule(epochs, drop):
    """The learning rate falls to a tenth after ``drop`` of ``epochs`` epochs."""
    return L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[drop], num_updates=epochs)
