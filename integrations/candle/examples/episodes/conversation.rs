//! A long conversation in several topics, with facts that are asked for later. Seeded: the same seed, the same conversation.
//!
//! Topics come in sessions, each topic more than once, so that a topic is no stretch of time. A fact ties a word to a thing of its
//! topic; the same words serve all topics, so that knowing the topic does not answer anything.

use kvbudget_candle::episodes::Utterance;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Topic {
    name: &'static str,
    /// Things that facts are about.
    things: [&'static str; 6],
    /// What else is said of it.
    said: [&'static str; 8],
}

const TOPICS: [Topic; 4] = [
    Topic {
        name: "cooking",
        things: ["oven", "soup pot", "spice jar", "frying pan", "recipe book", "bread knife"],
        said: [
            "The sauce needs more garlic and a little butter",
            "I let the dough rest before I bake the bread",
            "Fresh basil tastes better than dried basil",
            "We should simmer the onions until they are sweet",
            "The roast chicken was tender and the potatoes crisp",
            "A pinch of salt makes the chocolate cake richer",
            "My mother taught me to cook rice in broth",
            "The kitchen smelled of cinnamon and baked apples",
        ],
    },
    Topic {
        name: "sailing",
        things: ["boat", "anchor", "compass", "harbor gate", "life raft", "mast"],
        said: [
            "The wind turned north and the sea became rough",
            "We reefed the sail before the storm reached us",
            "The tide was low when we left the bay",
            "A sailor should always watch the waves and the clouds",
            "We docked at a small island to fill the water tanks",
            "The crew slept on deck under the stars",
            "Salt water ruins the ropes after a few voyages",
            "The lighthouse guided us along the rocky coast",
        ],
    },
    Topic {
        name: "gardening",
        things: ["greenhouse", "rose bed", "garden shed", "compost bin", "pond", "apple tree"],
        said: [
            "The tomatoes need water every morning in summer",
            "I planted tulips along the fence last autumn",
            "Snails ate the young lettuce leaves again",
            "The soil is too dry for the new seeds",
            "Prune the hedge before the birds start to nest",
            "Bees love the lavender next to the lawn",
            "The roots of the old oak lift the stones of the path",
            "Weeds grow faster than the flowers after the rain",
        ],
    },
    Topic {
        name: "music",
        things: ["guitar", "piano", "drum kit", "violin case", "concert hall", "record player"],
        said: [
            "The choir sang the second song a little too slow",
            "I practise scales for an hour before the rehearsal",
            "The melody is simple but the rhythm is hard",
            "Our band will play jazz at the festival",
            "The singer lost her voice before the show",
            "He tuned the strings by ear and played a waltz",
            "The orchestra needs another cello for the symphony",
            "That album has the best bass line I ever heard",
        ],
    },
];

/// Words that facts end in: each a token of its own, the first letters apart.
pub const WORDS: [&str; 16] = [
    "tiger", "lemon", "silver", "winter", "dragon", "pepper", "marble", "orange", "castle",
    "rocket", "velvet", "island", "copper", "falcon", "garlic", "hammer",
];

/// Something that was said once and is asked for.
pub struct Fact {
    pub topic: usize,
    pub question: String,
    /// How the answer begins; the word follows.
    pub prefix: String,
    /// Index into [`WORDS`].
    pub word: usize,
}

pub struct Conversation {
    pub utterances: Vec<Utterance>,
    /// Topic of each utterance.
    pub topics: Vec<usize>,
    pub facts: Vec<Fact>,
}

/// A conversation of `utterances`, with `facts` facts in each of `topics` topics (at most 4, of 6 facts).
pub fn conversation(seed: u64, utterances: usize, topics: usize, facts: usize) -> Conversation {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let topics = &TOPICS[..topics.min(TOPICS.len())];
    let session = 8;
    let mut order: Vec<usize> =
        (0..utterances.div_ceil(session)).map(|s| s % topics.len()).collect();
    order.shuffle(&mut random);
    let mut said: Vec<usize> = order.iter().flat_map(|&t| [t; 8]).collect();
    said.truncate(utterances);

    let mut words: Vec<usize> = (0..WORDS.len()).collect();
    words.shuffle(&mut random);
    let mut words = words.into_iter().cycle();
    let mut facts_at = vec![None; said.len()];
    let mut asked = Vec::new();
    for (t, topic) in topics.iter().enumerate() {
        let mut things = topic.things;
        things.shuffle(&mut random);
        let mut places: Vec<usize> = (0..said.len()).filter(|&u| said[u] == t).collect();
        places.shuffle(&mut random);
        for (thing, place) in things.into_iter().zip(places).take(facts) {
            let word = words.next().unwrap_or(0);
            facts_at[place] = Some((thing, word));
            asked.push(Fact {
                topic: t,
                question: format!("About {}: what do you call your {thing}?", topic.name),
                prefix: format!("I call my {thing}"),
                word,
            });
        }
    }
    let mut say = |(u, &t): (usize, &usize)| {
        let speaker = if u % 2 == 0 { "Alice" } else { "Bob" };
        let topic = &topics[t];
        let small = topic.said.choose(&mut random).copied().unwrap_or_default();
        let text = match facts_at[u] {
            Some((thing, word)) => {
                format!("{small}. I call my {thing} {}.", WORDS[word])
            }
            None => {
                let other = topic.said[random.random_range(0..topic.said.len())];
                format!("{small}. {other}.")
            }
        };
        Utterance { speaker: speaker.to_owned(), text }
    };
    let utterances = said.iter().enumerate().map(&mut say).collect();
    asked.shuffle(&mut random);
    Conversation { utterances, topics: said, facts: asked }
}
