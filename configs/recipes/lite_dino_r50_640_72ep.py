import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from ..common.recipes import use_matchability
from ..common.schedule import COCO_EPOCH, step_schedule, warm_up
from ..dino.lite_dino_r50_h3l1_2p1x3_36ep import data, dataloader, model, optimizer, train

# RT-DETR's size of images, which are not kept in proportion.
resize = L(T.Resize)(shape=(640, 640))
*rest, _ = dataloader.train.mapper.augmentations
dataloader.train.mapper.augmentations = [*rest, resize]
dataloader.test.mapper.augmentations = [resize]
model.queries.num_queries = 300
use_matchability(model)
train.max_iter = 72 * COCO_EPOCH
lr_multiplier = warm_up(step_schedule(epochs=72, drop=60), train)
train.ema.enabled = True
