"""English prose on four subjects, written for this project: what a language model's perplexity is measured on."""

TEXT = """\
The ferry left the harbour a little after seven, when the fog had not yet lifted from the water. Most of the \
passengers stayed inside, where it was warm, and drank coffee from paper cups. A boy of about ten stood at the rail \
with his grandfather and asked him why the gulls followed the ship. The old man said that gulls are practical \
animals. They have learned that people drop bread, and that a ship's propeller brings small fish to the surface. \
The boy thought about this for a while, then took a crust from his pocket and threw it as far as he could. Three \
birds dived for it at once, and the smallest of them won.

A heat pump works like a refrigerator in reverse. It takes energy from the outside air, even when that air is cold, \
and moves it into the house. To do this it compresses a gas, which becomes hot, and lets it expand again, which \
makes it cold. Because most of the heat is moved rather than made, one unit of electricity can deliver three or \
four units of warmth. The colder it gets outside, the harder the machine has to work, so the efficiency falls in \
winter, exactly when it is needed most. Good insulation therefore matters as much as the pump itself.

When the committee met on Thursday, nobody wanted to talk about the budget. The treasurer had prepared twelve pages \
of figures, but the projector did not work and the copies were still at the printer. So they spoke about the roof \
instead. It had been leaking since March, and the estimate for the repair was higher than anyone had expected. In \
the end they agreed to ask two more companies for an offer, and to move the piano away from the window.

In mathematics, a prime number is a natural number greater than one that is not the product of two smaller natural \
numbers. There are infinitely many of them, as was shown more than two thousand years ago. Suppose that there were \
only finitely many, multiply them all together and add one. The result is not divisible by any prime on the list, \
so it is either a new prime or has a prime factor that is missing from the list. Either way the list was not \
complete."""
