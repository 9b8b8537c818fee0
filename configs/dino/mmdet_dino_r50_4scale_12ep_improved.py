from .mmdet_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.freeze_at = 0
model.position_encoding.temperature = 10000
model.position_encoding.offset = -0.5
model.denoising.num_queries = 300
model.criterion.weight_class = 2.0
optimizer.lr = 2e-4
optimizer.params.lr_factor_func.factors = {"backbone.": 0.1, "sampling_offsets": 0.1}
