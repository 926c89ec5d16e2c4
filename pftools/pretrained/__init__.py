"""Models in Hugging Face format, before anything was done to them: found by name, read about, loaded.

base_models  models by name: the embedded one, a hub id, a folder; devices and dtypes
model_files  what a model's files say without loading it: settings and shapes
suitable     whether a model can be worked on, told from its files
on_disk      a model whose layers are loaded one at a time, and written back
streamed     a model that is larger than the memory
loading      a model loaded to where it is to be: a device, several, or a file

A model by any name, runs of pftools included, is loaded by `pftools.models`.
"""
