"""The 80 objects of COCO and words for them.

Data only, in a file that `chair.py` imports: of a metric that is loaded by its path, `evaluate` copies what is imported
and no other files.

Source and licence. The names of the objects are the categories of COCO, "Microsoft COCO: Common Objects in Context"
(Lin et al. 2014), https://cocodataset.org; COCO's annotations are by the COCO Consortium under the Creative Commons
Attribution 4.0 licence (https://cocodataset.org/#termsofuse). The other words were written for hera-trainer, under its
licence, Apache-2.0. They are not the list of "Object Hallucination in Image Captioning", which is `data/synonyms.txt`
of https://github.com/LisaAnne/Hallucination and can be given to the metric by its path.

Words are in the singular; their regular plurals are derived. A word stands under one object only. Left out are words
that mean something else at least as often, such as glass, plate, bag, bow, plant, light, screen, football and bat.
"""

NAME = "hera-coco-80"

# Object: other words for it, separated by commas; the next object.
_OBJECTS = """
    person: people, human, man, woman, gentleman, lady, guy, gal, dude, fellow, boy, girl, child, kid, baby, infant,
    toddler, teen, teenager, youngster, adult, male, female, individual, pedestrian, passerby, bystander, onlooker,
    spectator, crowd, mother, mom, father, dad, parent, grandmother, grandfather, son, daughter, brother, sister,
    husband, wife, couple, bride, groom, family, friend, tourist, traveler, passenger, commuter, driver, rider,
    cyclist, bicyclist, biker, motorcyclist, horseman, jockey, cowboy, skier, snowboarder, skateboarder, skater,
    surfer, swimmer, runner, jogger, hiker, climber, athlete, sportsman, player, batter, pitcher, catcher, umpire,
    referee, golfer, worker, employee, waiter, waitress, chef, baker, bartender, vendor, farmer, fisherman,
    businessman, businesswoman, policeman, policewoman, cop, officer, firefighter, fireman, soldier, sailor, pilot,
    doctor, nurse, teacher, student, musician, artist, photographer; bicycle: bike, tricycle, mountain bike, road
    bike, tandem; car: automobile, sedan, suv, coupe, hatchback, station wagon, jeep, van, minivan, taxi, taxicab,
    cab, limousine, limo, police car, sports car; motorcycle: motorbike, motor bike, motor cycle, moped, scooter,
    motor scooter, dirt bike, vespa; airplane: aeroplane, air plane, plane, aircraft, jet, airliner, jetliner,
    biplane, seaplane, propeller plane, fighter jet; bus: minibus, double decker, double-decker, school bus, coach
    bus, trolleybus; train: locomotive, tram, streetcar, subway train, railcar, freight train; truck: lorry, pickup,
    pick-up, pick up truck, pickup truck, fire truck, firetruck, fire engine, garbage truck, dump truck, tow truck,
    tractor trailer, big rig; boat: ship, sailboat, sail boat, rowboat, row boat, motorboat, speedboat, canoe,
    kayak, yacht, ferry, barge, dinghy, raft, gondola, catamaran, tugboat, tug boat, cruise ship, steamboat,
    houseboat, lifeboat; traffic light: traffic signal, stoplight, stop light, street light, streetlight; fire
    hydrant: hydrant, fireplug; stop sign; parking meter; bench: park bench, pew; bird: pigeon, dove, seagull, gull,
    duck, duckling, goose, gosling, swan, owl, eagle, hawk, falcon, parrot, parakeet, macaw, cockatoo, sparrow,
    finch, robin, crow, raven, magpie, heron, egret, pelican, flamingo, ostrich, emu, peacock, penguin, hen,
    rooster, hummingbird, woodpecker, kingfisher, cormorant, vulture, stork, songbird, waterfowl; cat: kitten,
    kitty, tomcat, feline, tabby; dog: puppy, pup, doggy, doggie, hound, canine, mutt, terrier, retriever, labrador,
    poodle, bulldog, beagle, dachshund, chihuahua, corgi, husky, sheepdog, collie, spaniel, pug, greyhound,
    dalmatian, rottweiler, doberman; horse: pony, foal, colt, filly, mare, stallion, racehorse, steed; sheep: lamb,
    ewe, ram, goat; cow: cattle, bull, calf, ox, heifer, bison, buffalo; elephant; bear: grizzly, polar bear, bear
    cub, panda; zebra; giraffe; backpack: back pack, rucksack, knapsack, book bag; umbrella: parasol; handbag: hand
    bag, purse, pocketbook, briefcase, wallet; tie: necktie, neck tie, bowtie, bow tie; suitcase: suit case,
    luggage, baggage; frisbee: flying disc, flying disk; skis: ski; snowboard: snow board; sports ball: ball, soccer
    ball, tennis ball, golf ball, beach ball; kite; baseball bat; baseball glove: baseball mitt, catcher mitt;
    skateboard: skate board, longboard; surfboard: surf board, bodyboard, boogie board, paddleboard, paddle board,
    wakeboard; tennis racket: tennis racquet, racket, racquet; bottle: wine bottle, water bottle, beer bottle; wine
    glass: wineglass, goblet; cup: mug, teacup, coffee cup; fork; knife: butter knife, steak knife, pocketknife;
    spoon: teaspoon, tablespoon; bowl; banana: plantain; apple; sandwich: burger, hamburger, cheeseburger, panini,
    sub sandwich, hoagie; orange: tangerine, clementine; broccoli; carrot; hot dog: hotdog; pizza; donut: doughnut,
    bagel; cake: cupcake, cheesecake, pancake, birthday cake; chair: armchair, arm chair, stool, barstool, bar
    stool, rocking chair, lawn chair, high chair, seat; couch: sofa, loveseat, love seat, settee, futon, recliner;
    potted plant: houseplant, house plant, pot plant; bed: bunk bed, crib, cot; dining table: table, desk, coffee
    table, kitchen table, dinner table, picnic table; toilet: urinal, commode, lavatory; tv: television, tv set,
    television set, televison, flat screen, flatscreen, flat-screen, monitor, computer monitor, computer screen;
    laptop: laptop computer, notebook computer, netbook, macbook, computer; mouse: computer mouse; remote: remote
    control, remote controller, wii remote, wiimote; keyboard: computer keyboard; cell phone: cellphone, phone,
    mobile phone, telephone, smartphone, smart phone, iphone; microwave: microwave oven; oven: stove, stovetop,
    stove top, stove top oven, kitchen range; toaster; sink: washbasin, wash basin; refrigerator: fridge, freezer,
    refrigerator freezer; book: textbook; clock: alarm clock, wall clock, grandfather clock; vase; scissors:
    scissor, pair of scissors, shears; teddy bear: teddy, teddybear, stuffed bear; hair drier: hair dryer,
    hairdryer, hairdrier, blow dryer, blow drier; toothbrush: tooth brush
"""
SYNONYMS = {
    entry.partition(":")[0]: entry.partition(":")[2].strip() for entry in " ".join(_OBJECTS.split()).split("; ")
}

# Pairs of words that name another object than their parts, by the rules of the paper's code; an empty text stands for
# none of the 80. Objects and other words of several words need no entry.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
PAIRS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"{age} {animal}": "" for age in ("baby", "adult") for animal in ("animal", "cub")},
    "passenger jet": "airplane",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "",
    "train track": "",
}
