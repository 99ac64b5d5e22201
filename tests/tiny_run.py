"""The keys of a run that takes seconds: a small network on the digits."""

OPTIONS = {
    "recipe": "digits",
    "backbone": "resnetv2_18",
    "backbone_args": '{"layers": [1, 1], "channels": [16, 32], "stem_chs": 16}',
    "global_size": 16,
    "local_size": 12,
    "bits": 20,
    "hidden": 32,
    "max_steps": 20,
    "log_every": 10,
    "save_every": 10,
}
