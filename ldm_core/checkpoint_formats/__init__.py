"""Import other programs' checkpoints, and export ours for them.

    importing    any checkpoint, whatever it is
    imported     the result
    compvis      the paper's code release: .ckpt files and YAML, whole models and first stages, in and out
    diffusers    Hugging Face diffusers: folders of pipelines and first stages, in and out

In each of the two, `names` is one table of weights' names that is read in both directions (`weights.name_mapping` walks
it), and configurations are translated setting by setting: what would be lost is refused by name.
"""
