"""One palette for every plot: Okabe and Ito's, told apart without red and green (jfly.uni-koeln.de/color, 2008)."""

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
ALL = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # in the order to take them
