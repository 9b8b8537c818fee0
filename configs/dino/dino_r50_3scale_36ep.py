from .dino_r50_4scale_36ep import data, dataloader, lr_multiplier, model, optimizer, train

# Without the stride-8 map, which holds three quarters of the tokens.
model.in_features = ["res4", "res5"]
model.num_levels = 3
