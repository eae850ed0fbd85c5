"""How good generated images are: distances and shares in the features of a classifier, with a floor and controls."""
