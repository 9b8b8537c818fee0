from .dab_detr_dc5_r50_50ep import data, dataloader, lr_multiplier, model, optimizer, train

model.queries.num_patterns = 3
