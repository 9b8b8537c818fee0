from .detrex_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.out_features = model.in_features = ["res2", "res3", "res4", "res5"]
model.num_levels = 5
