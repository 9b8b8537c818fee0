# A COCO-format dataset of one's own; where these are set, train_net.py registers it and points the
# data loaders and the number of classes at it. See docs/own_data.md.
data = dict(train_json=None, train_images=None, val_json=None, val_images=None)
