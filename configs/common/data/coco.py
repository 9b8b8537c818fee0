import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.modeling import DatasetMapperTTA
from omegaconf import OmegaConf

from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.data.mapper import DetectionMapper
from lite_detr.data.train_loader import build_train_loader

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    # The references also train on images without objects.
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_train", filter_empty=False),
    mapper=L(DetectionMapper)(
        is_train=True,
        # DETR's augmentation: half of the images are cropped between two resizings.
        augmentations=[
            L(T.RandomFlip)(horizontal=True),
            L(T.RandomApply)(
                tfm_or_aug=L(T.AugmentationList)(
                    augs=[
                        # Without a limit a strip of 1 x 12000 pixels would take 4 gigapixels; up
                        # to 20 : 1 the limit changes nothing.
                        L(T.ResizeShortestEdge)(
                            short_edge_length=(400, 500, 600),
                            max_size=12000,
                            sample_style="choice",
                        ),
                        L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
                    ]
                ),
                prob=0.5,
            ),
            L(T.ResizeShortestEdge)(
                short_edge_length=tuple(range(480, 801, 32)),
                max_size=1333,
                sample_style="choice",
            ),
        ],
        image_format="RGB",
    ),
    total_batch_size=16,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
    mapper=L(DetectionMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

# Test-time augmentation, with the keys and the sizes of Detectron2's TEST.AUG.
dataloader.test_aug = dict(
    enabled=False,
    mapper=L(DatasetMapperTTA)(
        min_sizes=(400, 500, 600, 700, 800, 900, 1000, 1100, 1200), max_size=4000, flip=True
    ),
    # Boxes of two views are one object if their IoU is larger.
    iou_threshold=0.55,
)

dataloader.evaluator = L(DetectionEvaluator)(dataset_name="${..test.dataset.names}")
