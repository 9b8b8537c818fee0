from .dino_r50_4scale_36ep import data, dataloader, lr_multiplier, model, optimizer, train

# The map of stride 4 has four times the tokens of all others.
model.backbone.out_features = model.in_features = ["res2", "res3", "res4", "res5"]
model.num_levels = 5
