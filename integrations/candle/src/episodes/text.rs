//! From a conversation to segments, and from segments to a probe (EpiCache's wording).

/// Characters of an assistant's reply that is not split.
const LONG: usize = 500;
/// Characters of a piece that is not worth an utterance.
const SHORT: usize = 10;

/// What someone said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Utterance {
    pub speaker: String,
    pub text: String,
}

impl Utterance {
    /// As a line of a transcript.
    pub fn line(&self) -> String {
        format!("{} said \"{}\"\n", self.speaker, self.text)
    }
}

/// Lines of `per` consecutive utterances each; the last segment may be shorter. Long replies of `assistant`, if someone is
/// one, count as an utterance per sentence.
pub fn segments(conversation: &[Utterance], per: usize, assistant: Option<&str>) -> Vec<String> {
    let mut lines = Vec::new();
    for utterance in conversation {
        let Utterance { speaker, text } = utterance;
        if assistant != Some(speaker) || text.chars().count() <= LONG {
            lines.push(utterance.line());
            continue;
        }
        let pieces = sentences(text).filter(|piece| piece.chars().count() > SHORT);
        let say = |text: &str| Utterance { speaker: speaker.clone(), text: text.to_owned() };
        lines.extend(pieces.map(|text| say(text).line()));
    }
    lines.chunks(per.max(1)).map(<[String]>::concat).collect()
}

/// Pieces that end with a run of `.`, `!` or `?` before white space or the end.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text.trim();
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let ends = |(at, c): (usize, char)| {
            let after = &rest[at + c.len_utf8()..];
            (matches!(c, '.' | '!' | '?') && after.chars().next().is_none_or(char::is_whitespace))
                .then_some(at + c.len_utf8())
        };
        let end = rest.char_indices().find_map(ends).unwrap_or(rest.len());
        let (piece, later) = rest.split_at(end);
        rest = later.trim_start();
        Some(piece)
    })
}

/// The text of some segments, as a probe has it: a line more after each.
pub fn patched_prompt(segments: &[String], medoids: &[usize]) -> String {
    medoids.iter().map(|&m| format!("{}\n", segments[m])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(speaker: &str, text: &str) -> Utterance {
        Utterance { speaker: speaker.into(), text: text.into() }
    }

    #[test]
    fn segments_are_lines_of_several_utterances() {
        let talk = [say("Ann", "Hi."), say("Bob", "Hello!"), say("Ann", "Bye.")];
        let segments = segments(&talk, 2, Some("Bob"));
        assert_eq!(segments, ["Ann said \"Hi.\"\nBob said \"Hello!\"\n", "Ann said \"Bye.\"\n"]);
        assert_eq!(patched_prompt(&segments, &[1, 1]), "Ann said \"Bye.\"\n\n".repeat(2));
    }

    #[test]
    fn long_replies_are_split_into_sentences() {
        let long = format!(
            "Version 1.5 is out!? Yes. {} The end of the long reply",
            "Word ".repeat(100) + "ends."
        );
        let talk = [say("bot", &long), say("user", &long)];
        let segments = segments(&talk, 1, Some("bot"));
        // "Yes." is too short for an utterance.
        assert_eq!(segments[0], "bot said \"Version 1.5 is out!?\"\n");
        assert!(
            segments[1].starts_with("bot said \"Word Word") && segments[1].ends_with("ends.\"\n")
        );
        assert_eq!(segments[2], "bot said \"The end of the long reply\"\n");
        assert_eq!(segments.len(), 4, "the user's own long text is whole");
    }
}
