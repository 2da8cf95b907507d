"""25 pairs of sentences that mean the same in other words, written for this project.

Paraphrases make a model's ranking of similarities meaningful: each sentence's nearest neighbour is known, and the other
48 lie at graded distances.
"""

PAIRS = (
    ("How do I reset my password?", "I forgot my login and need a new password."),
    ("The train to Berlin leaves at nine.", "Our rail connection to Berlin departs at 9 o'clock."),
    ("A man is playing a guitar on stage.", "Someone performs on the guitar in front of an audience."),
    ("Prices rose sharply last month.", "There was a steep increase in the cost of goods in the past month."),
    ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
    ("She is an excellent surgeon.", "As a doctor in the operating room she is outstanding."),
    ("Heavy rain flooded the valley.", "The valley was under water after the storm."),
    ("My phone battery runs out too quickly.", "The charge of my mobile does not last long."),
    ("The judge dismissed the case.", "The lawsuit was thrown out of court."),
    ("We planted tomatoes in the garden.", "There are vegetables growing in our backyard."),
    ("The company hired two hundred engineers.", "A firm recruited many technical staff."),
    ("He broke his leg while skiing.", "A skiing accident left him with a fractured leg."),
    ("The museum is closed on Mondays.", "You cannot visit the gallery at the start of the week."),
    ("Vaccines protect children from disease.", "Immunization keeps kids from getting sick."),
    ("The bread is still warm.", "This loaf just came out of the oven."),
    ("Please turn down the music.", "Could you make the song quieter?"),
    ("The rocket reached orbit after eight minutes.", "It took the launch vehicle eight minutes to get into space."),
    ("I would like to cancel my subscription.", "How can I stop the monthly plan?"),
    ("The river is home to rare fish.", "Unusual species of fish live in this stream."),
    ("Learning a language takes patience.", "You need time and persistence to become fluent."),
    ("The bridge was built in 1932.", "Construction of the crossing finished in the thirties."),
    ("Their team won the final by two goals.", "They took the championship match two to nil."),
    ("Solar panels convert sunlight into electricity.", "Photovoltaic cells produce power from the sun."),
    ("The soup needs more salt.", "This broth tastes bland."),
    ("Parents worry about screen time.", "Mothers and fathers are concerned about how long children use devices."),
)

SENTENCES = tuple(sentence for pair in PAIRS for sentence in pair)

# Answered by one sentence of the pair about subscriptions, with hardly a word in common.
QUERY = "I no longer want to pay for this service every month."
