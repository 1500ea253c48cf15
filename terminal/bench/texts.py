"""Built-in prompts, written for this file: plain prose, so that tokens and routing are those of language."""

TEXTS = (
    "The lighthouse keeper counted the boats every evening. Tonight there was one too many. He went down the stairs "
    "with his lamp, past the kitchen where the kettle still sang, and out onto the wet stones to see who had come "
    "in.",
    "Once there was a small grey donkey who carried flour from the mill to the village. She knew every stone of the "
    "road, and the place where the brook ran over it in spring. One morning the bridge was gone, and the miller was "
    "asleep.",
    "A recipe for a cold day: cut two onions and a leek, let them soften in butter, add potatoes in pieces and "
    "water to cover them. While the pot simmers, warm the bowls and slice the bread. Then taste it, and think of "
    "what is missing.",
    "Dear Anna, the garden has gone wild since you left. The beans have climbed the gate and the gate no longer "
    "shuts. Your brother says we should cut them back, but there are finches in them now, and I do not have the "
    "heart to do it.",
    "Water boils at a lower temperature on a mountain, because less air presses on it. An egg therefore takes "
    "longer there. Somebody who cooks at the coast by the clock and moves to the hills must learn again what five "
    "minutes mean.",
    "The train stopped between two stations. Nobody said why. A boy by the window began to draw the field outside: "
    "three poplars, a tractor without a driver, a dog that looked at the train as if it had been expected for a "
    "long time.",
    "List what a tent needs for a week in the rain: a sheet for the ground, pegs that hold in sand, a line to dry "
    "socks, a pot with a lid. Then say which of these one could leave at home, and what one would do instead on the "
    "third day.",
    "The two clocks in the hall had never agreed. Grandmother wound one and grandfather the other, and each child "
    "of the family chose early which to believe. When the house was sold, the buyers asked for the clocks, and for "
    "the quarrel.",
    "A sorting machine for letters reads an address in less time than a person needs to blink. It is wrong once in "
    "some thousands. Those letters come to a table at the end of the hall, where Mr Okoro reads them slowly, with a "
    "glass.",
    "Tom found a key under the apple tree. It was too small for any door in the house. He tried the cupboard, the "
    "tea chest and the old piano. Then his sister whispered that she had once seen a very small lock, and took his "
    "hand.",
    "Questions for a bridge builder: how much does the deck move on a hot day, who listens to the bolts, what was "
    "the worst wind, and did you walk across it first or did you send somebody else? Answer them in the order you "
    "like.",
    "In winter the ferry runs twice a day, and the island is quiet between. The teacher has nine pupils in one "
    "room. She gives the older ones a chart of the tides and asks them to find the hour at which one could walk to "
    "the seal rock.",
)
