"""Region candidates (part C): images with labelled boxes become conversations about a list of candidate regions.

`labels` reads the label files, `scan` counts what is in them, `prepare` divides images and adds boxes without a defect,
`build` writes conversations; `text` writes the boxes in the frame the model sees. No torch here.
"""
