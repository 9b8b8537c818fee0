from detectron2.config import LazyCall as L

from lite_detr.data.mixing import Mixing, MixUp, Mosaic
from lite_detr.modeling import (
    CriteriaByOutput,
    FocalLoss,
    GIoUAwareLoss,
    HighOrderMatcher,
    HungarianMatcher,
    IoUAwareLoss,
    MatchabilityLoss,
    MixedDecoderLayer,
    MixedMatcher,
    OneToManyCriterion,
    OneToManyMatcher,
    PositionModulatedMatcher,
    PositionSupervisedLoss,
    SetCriterion,
)

# The code that these recipes come from has this term in its IoUs.
EPS = 1e-6


def make_criterion(class_loss, matcher, weight_class=1.0):
    """Return a criterion for one kind of predictions."""
    matcher.giou_eps = EPS
    return L(SetCriterion)(
        matcher=matcher, weight_class=weight_class, giou_eps=EPS, class_loss=class_loss
    )


def use_align(model):
    """Align-DETR (arXiv 2304.07527): IoU-aware targets, two queries per object but for the last.

    H-DETR's further queries are matched as ever: they have several per object already.
    """
    mixed = make_criterion(L(IoUAwareLoss)(), L(MixedMatcher)(match_number=2, decay=1.5))
    single = make_criterion(L(IoUAwareLoss)(), L(HungarianMatcher)())
    model.criterion = L(CriteriaByOutput)(layers=mixed, last=single, one_to_many=single)


def use_stable(model):
    """Stable-DINO (arXiv 2304.04742): position-supervised loss, position-modulated cost."""
    model.criterion = L(CriteriaByOutput)(
        layers=make_criterion(L(PositionSupervisedLoss)(), L(PositionModulatedMatcher)(), 6.0),
        denoising=make_criterion(L(PositionSupervisedLoss)(), L(HungarianMatcher)(), 1.0),
    )


def use_mixed(model):
    """MS-DETR (arXiv 2401.03989): one-to-many supervision of the same queries.

    Its proposals are matched without the class cost.
    """
    model.decoder.layer._target_ = MixedDecoderLayer
    model.criterion = L(CriteriaByOutput)(
        layers=make_criterion(L(FocalLoss)(), L(HungarianMatcher)()),
        proposals=make_criterion(L(FocalLoss)(), L(HungarianMatcher)(cost_class=0.0), 2.0),
        mixed=L(OneToManyCriterion)(
            matcher=L(OneToManyMatcher)(threshold=0.4, limit=6, giou_eps=EPS),
            weight_class=2.0,
            giou_eps=EPS,
        ),
    )


def use_rank(model, start_iter):
    """Rank-DETR (arXiv 2310.08854): GIoU-aware loss, high-order cost from an iteration on."""
    matcher = L(HighOrderMatcher)(start_iter=start_iter, order=4.0)
    model.criterion = L(CriteriaByOutput)(
        layers=make_criterion(L(GIoUAwareLoss)(), matcher, 2.0),
        proposals=make_criterion(L(FocalLoss)(), matcher, 2.0),
    )


def use_matchability(model):
    """The matchability-aware loss of DEIM (arXiv 2412.04234)."""
    model.criterion.class_loss = L(MatchabilityLoss)(gamma=1.5)
    model.criterion.weight_class = 1.0


def use_dense(dataloader):
    """DEIM's dense one-to-one matching: mosaic and mixup in the first half of the iterations."""
    dataloader.train.mixing = L(Mixing)(
        combinations=[L(Mosaic)(prob=0.5), L(MixUp)(prob=0.5)],
        num_iters="${train.max_iter}",
        accumulation="${train.accumulation}",
        share=0.5,
    )
