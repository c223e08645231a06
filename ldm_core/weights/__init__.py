"""Weights in files, whoever wrote them.

named_tensors    tensors by name, read one by one
weights_files    .safetensors files, whole or in shards, read and written; reads torch.save's as well
pickled          files of torch.save read as data: nothing in them is executed
name_mapping     a table of another program's names, read in both directions
clip_names       names of CLIP's text weights in the transformers library
finite           refuse NaN and infinity
digest           sha256 of files
"""
