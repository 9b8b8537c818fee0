from .lite_dino_r50_h3l1_2p1x3_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.encoder.num_blocks = 1
model.encoder.updates_per_block = 6
