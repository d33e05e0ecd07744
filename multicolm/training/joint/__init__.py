"""Training of the base model together with the head, or of the base model alone.

job       what is trained, on what, how; checked before anything is loaded
data      the texts of a score table as batches
start     what it begins with: the head, and the base model with what is trained of it
model     the joint model and its loss
loop      steps, their states on disk, what is measured
save      the trained base model and the ensemble file
train     all of that: ``train_joint``
"""
