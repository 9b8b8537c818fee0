from .sparse_detr_r50_rho03_50ep import data, dataloader, lr_multiplier, model, optimizer, train

model.encoder.keep_ratio = 0.5
