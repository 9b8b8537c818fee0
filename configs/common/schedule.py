from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

# 118,287 images of COCO train2017 in batches of 16.
COCO_EPOCH = 7392


def step_schedule(epochs, drop):
    """The learning rate falls to a tenth after ``drop`` of ``epochs`` epochs."""
    return L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[drop], num_updates=epochs)


def warm_up(schedule, train, iterations=1000):
    """The learning rate of a schedule rises linearly over the first iterations."""
    return L(WarmupParamScheduler)(
        scheduler=schedule,
        warmup_factor=0.001,
        warmup_length=iterations / train.max_iter,
        warmup_method="linear",
    )


def cosine_schedule(warmup):
    """The learning rate rises over the share ``warmup`` of the training and then falls to 0."""
    return L(WarmupParamScheduler)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
        warmup_factor=0.01,
        warmup_length=warmup,
    )
