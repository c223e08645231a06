"""Weights in files, whoever wrote them; no model is known here.

named_tensors    tensors by name, read one by one
weights_files    .safetensors, one file or several shards, read and written
pickled          what torch.save wrote, read as data: nothing in it is executed
name_mapping     one table from their names to ours, read in both directions
clip_names       names of CLIP's text weights, old and current
finite           refuse NaN and infinity
"""
