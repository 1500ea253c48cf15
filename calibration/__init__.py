"""`moedial calibrate`: measures what each expert count of a checkpoint keeps and costs, and writes `calibration.json`.

The file's form is in `weights/calibration.py`, which the HTTP process reads. Nothing here is imported while serving.
"""
