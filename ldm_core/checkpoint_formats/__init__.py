"""Other programs' checkpoints as ours, and ours as theirs.

    importing             any checkpoint, whatever it is; what comes of it: imported
    compvis               the paper's code release: .ckpt files, whole models and first stages, in and out
    diffusers             Hugging Face diffusers: folders of pipelines and first stages, in and out

Names of weights are one table a program, read in both directions:

    name_mapping          how a table is walked                     compvis_names, diffusers_names: the tables

Configurations are translated setting by setting; what would be lost is refused by name:

    settings              reading and refusing                      compvis_config, compvis_conditioning: YAML
                                                                    diffusers_config, diffusers_reading,
                                                                    diffusers_defaults, diffusers_tokenizers: JSON

Files:

    pickled               what torch.save wrote, as data: nothing in it is executed
    weights_files         .safetensors, one or in shards, read and written
    named_tensors         tensors by name, read one by one
"""
