"""Names and colours of the official data sets, in the order of their class ids.

From https://github.com/CSAILVision/sceneparsing (the first of the names of each class, and its
colour), https://github.com/nightrome/cocostuff and https://github.com/mcordts/cityscapesScripts.
"""

from __future__ import annotations

RGB = tuple[int, int, int]

# one class a line: red, green, blue, name
_ADE20K = """
  0   0   0 other
120 120 120 wall
180 120 120 building
  6 230 230 sky
 80  50  50 floor
  4 200   3 tree
120 120  80 ceiling
140 140 140 road
204   5 255 bed
230 230 230 windowpane
  4 250   7 grass
224   5 255 cabinet
235 255   7 sidewalk
150   5  61 person
120 120  70 earth
  8 255  51 door
255   6  82 table
143 255 140 mountain
204 255   4 plant
255  51   7 curtain
204  70   3 chair
  0 102 200 car
 61 230 250 water
255   6  51 painting
 11 102 255 sofa
255   7  71 shelf
255   9 224 house
  9   7 230 sea
220 220 220 mirror
255   9  92 rug
112   9 255 field
  8 255 214 armchair
  7 255 224 seat
255 184   6 fence
 10 255  71 desk
255  41  10 rock
  7 255 255 wardrobe
224 255   8 lamp
102   8 255 bathtub
255  61   6 railing
255 194   7 cushion
255 122   8 base
  0 255  20 box
255   8  41 column
255   5 153 signboard
  6  51 255 chest of drawers
235  12 255 counter
160 150  20 sand
  0 163 255 sink
140 140 140 skyscraper
250  10  15 fireplace
 20 255   0 refrigerator
 31 255   0 grandstand
255  31   0 path
255 224   0 stairs
153 255   0 runway
  0   0 255 case
255  71   0 pool table
  0 235 255 pillow
  0 173 255 screen door
 31   0 255 stairway
 11 200 200 river
255  82   0 bridge
  0 255 245 bookcase
  0  61 255 blind
  0 255 112 coffee table
  0 255 133 toilet
255   0   0 flower
255 163   0 book
255 102   0 hill
194 255   0 bench
  0 143 255 countertop
 51 255   0 stove
  0  82 255 palm
  0 255  41 kitchen island
  0 255 173 computer
 10   0 255 swivel chair
173 255   0 boat
  0 255 153 bar
255  92   0 arcade machine
255   0 255 hovel
255   0 245 bus
255   0 102 towel
255 173   0 light
255   0  20 truck
255 184 184 tower
  0  31 255 chandelier
  0 255  61 awning
  0  71 255 streetlight
255   0 204 booth
  0 255 194 television
  0 255  82 airplane
  0  10 255 dirt track
  0 112 255 apparel
 51   0 255 pole
  0 194 255 land
  0 122 255 bannister
  0 255 163 escalator
255 153   0 ottoman
  0 255  10 bottle
255 112   0 buffet
143 255   0 poster
 82   0 255 stage
163 255   0 van
255 235   0 ship
  8 184 170 fountain
133   0 255 conveyer belt
  0 255  92 canopy
184   0 255 washer
255   0  31 plaything
  0 184 255 swimming pool
  0 214 255 stool
255   0 112 barrel
 92 255   0 basket
  0 224 255 waterfall
112 224 255 tent
 70 184 160 bag
163   0 255 minibike
153   0 255 cradle
 71 255   0 oven
255   0 163 ball
255 204   0 food
255   0 143 step
  0 255 235 tank
133 255   0 trade name
255   0 235 microwave
245   0 255 pot
255   0 122 animal
255 245   0 bicycle
 10 190 212 lake
214 255   0 dishwasher
  0 204 255 screen
 20   0 255 blanket
255 255   0 sculpture
  0 153 255 hood
  0  41 255 sconce
  0 255 204 vase
 41   0 255 traffic light
 41 255   0 tray
173   0 255 ashcan
  0 245 255 fan
 71   0 255 pier
122   0 255 crt screen
  0 255 184 plate
  0  92 255 monitor
184 255   0 bulletin board
  0 133 255 shower
255 214   0 radiator
 25 194 194 glass
102 255   0 clock
 92   0 255 flag
"""

_CITYSCAPES = """
  0   0   0 unlabeled
  0   0   0 ego vehicle
  0   0   0 rectification border
  0   0   0 out of roi
  0   0   0 static
111  74   0 dynamic
 81   0  81 ground
128  64 128 road
244  35 232 sidewalk
250 170 160 parking
230 150 140 rail track
 70  70  70 building
102 102 156 wall
190 153 153 fence
180 165 180 guard rail
150 100 100 bridge
150 120  90 tunnel
153 153 153 pole
153 153 153 polegroup
250 170  30 traffic light
220 220   0 traffic sign
107 142  35 vegetation
152 251 152 terrain
 70 130 180 sky
220  20  60 person
255   0   0 rider
  0   0 142 car
  0   0  70 truck
  0  60 100 bus
  0   0  90 caravan
  0   0 110 trailer
  0  80 100 train
  0   0 230 motorcycle
119  11  32 bicycle
  0   0 142 license plate
"""

_COCO_STUFF = """
unlabeled, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana,
apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush, hair brush, banner, blanket, branch, bridge,
building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth,
clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal,
mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic,
platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf,
sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent,
textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""


def _names(table: str) -> tuple[str, ...]:
    return tuple(line.split(maxsplit=3)[3] for line in table.strip("\n").splitlines())


def _palette(table: str) -> tuple[RGB, ...]:
    rows = (line.split(maxsplit=3) for line in table.strip("\n").splitlines())
    return tuple((int(row[0]), int(row[1]), int(row[2])) for row in rows)


ADE20K_NAMES = _names(_ADE20K)
ADE20K_PALETTE = _palette(_ADE20K)
CITYSCAPES_NAMES = _names(_CITYSCAPES)
CITYSCAPES_PALETTE = _palette(_CITYSCAPES)
COCO_STUFF_NAMES = tuple(_COCO_STUFF.replace("\n", " ").strip().split(", "))
