//! What crosses between the shared library and the Rust half of this crate, which have separate statics: 64-bit words
//! and length-prefixed text, written and read here only.

use crate::{Checks, Class, CpAsync, MmaModel, Policy, Report, Schedule, Streams};

/// Takes bytes that one call hands over; called once.
pub(crate) type Sink = extern "C" fn(to: *mut Vec<u8>, bytes: *const u8, count: usize);

/// Words of a policy.
pub(crate) const POLICY_WORDS: usize = 9;

/// A policy as words.
pub(crate) fn policy_words(policy: &Policy) -> [u64; POLICY_WORDS] {
    let (schedule, quantum) = match policy.schedule {
        Schedule::InOrder => (0, 0),
        Schedule::Quantum(instructions) => (1, instructions),
        Schedule::OneBlock => (2, 0),
        Schedule::Random => (3, 0),
    };
    let cp_async = match policy.cp_async {
        CpAsync::Late => 0,
        CpAsync::Early => 1,
    };
    let mma = match policy.mma {
        MmaModel::Chain => 0,
        MmaModel::Exact => 1,
        MmaModel::Truncated => 2,
    };
    let streams = match policy.streams {
        Streams::Eager => 0,
        Streams::Lazy => 1,
    };
    let Checks { init, race } = policy.checks;
    [
        schedule,
        quantum.into(),
        cp_async,
        mma,
        policy.perturb.into(),
        streams,
        policy.seed,
        init.into(),
        race.into(),
    ]
}

/// The policy that words stand for.
pub(crate) fn policy(words: &[u64; POLICY_WORDS]) -> Option<Policy> {
    let [schedule, quantum, cp_async, mma, perturb, streams, seed, init, race] = *words;
    Some(Policy {
        schedule: match schedule {
            0 => Schedule::InOrder,
            1 => Schedule::Quantum(u32::try_from(quantum).ok()?),
            2 => Schedule::OneBlock,
            3 => Schedule::Random,
            _ => return None,
        },
        cp_async: *[CpAsync::Late, CpAsync::Early].get(cp_async as usize)?,
        mma: *[MmaModel::Chain, MmaModel::Exact, MmaModel::Truncated].get(mma as usize)?,
        perturb: perturb != 0,
        streams: *[Streams::Eager, Streams::Lazy].get(streams as usize)?,
        seed,
        checks: Checks { init: init != 0, race: race != 0 },
    })
}

macro_rules! classes {
    ($($class:ident)*) => {
        const CLASSES: &[Class] = &[$(Class::$class),*];

        /// Place in the list; a class that is missing from it does not compile.
        fn class_index(class: Class) -> u64 {
            let known = match class { $(Class::$class => Class::$class),* };
            CLASSES.iter().position(|&c| c == known).unwrap_or_default() as u64
        }
    };
}

classes! {
    OutOfBounds UseAfterFree Misaligned Uninitialised Race AsyncNotWaited DivergentBarrier BadMask
    Deadlock ReadOnly Trap Assert StreamRace HostBuffer Unsupported
}

/// Reports as bytes.
pub(crate) fn report_bytes(reports: &[Report]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for report in reports {
        word(&mut bytes, class_index(report.class));
        text(&mut bytes, &report.message);
        text(&mut bytes, &report.kernel);
        text(&mut bytes, report.source.as_deref().unwrap_or_default());
        text(&mut bytes, &report.instruction);
        word(&mut bytes, report.thread.is_some().into());
        let (block, thread) = report.thread.unwrap_or_default();
        block.iter().chain(&thread).for_each(|&n| word(&mut bytes, n.into()));
    }
    bytes
}

/// The reports that bytes stand for.
pub(crate) fn reports(bytes: &[u8]) -> Option<Vec<Report>> {
    let mut reader = Reader(bytes);
    let mut reports = Vec::new();
    while !reader.0.is_empty() {
        reports.push(reader.report()?);
    }
    Some(reports)
}

/// Words as bytes.
pub(crate) fn word_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The words that bytes stand for.
pub(crate) fn words(bytes: &[u8]) -> Vec<u64> {
    let mut reader = Reader(bytes);
    std::iter::from_fn(|| reader.word()).collect()
}

fn word(bytes: &mut Vec<u8>, word: u64) {
    bytes.extend(word.to_le_bytes());
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    word(bytes, text.len() as u64);
    bytes.extend(text.as_bytes());
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    fn text(&mut self) -> Option<String> {
        let count = self.word()? as usize;
        let (text, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }

    fn triple(&mut self) -> Option<[u32; 3]> {
        Some([self.word()? as u32, self.word()? as u32, self.word()? as u32])
    }

    fn report(&mut self) -> Option<Report> {
        let class = *CLASSES.get(self.word()? as usize)?;
        let (message, kernel) = (self.text()?, self.text()?);
        let source = Some(self.text()?).filter(|source| !source.is_empty());
        let instruction = self.text()?;
        let known = self.word()? != 0;
        let place = (self.triple()?, self.triple()?);
        Some(Report { class, message, kernel, source, instruction, thread: known.then_some(place) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_return() {
        let schedules =
            [Schedule::InOrder, Schedule::Quantum(37), Schedule::OneBlock, Schedule::Random];
        for (n, schedule) in schedules.into_iter().enumerate() {
            let policy = Policy {
                schedule,
                cp_async: if n == 1 { CpAsync::Early } else { CpAsync::Late },
                mma: [MmaModel::Chain, MmaModel::Exact, MmaModel::Truncated][n % 3],
                perturb: n == 2,
                streams: if n > 1 { Streams::Lazy } else { Streams::Eager },
                seed: u64::MAX - n as u64,
                checks: Checks { init: n != 0, race: n != 3 },
            };
            assert_eq!(super::policy(&policy_words(&policy)), Some(policy));
        }
        let mut words = policy_words(&Policy::default());
        words[0] = 4;
        assert_eq!(super::policy(&words), None);
    }

    #[test]
    fn reports_return() {
        let all: Vec<Report> = CLASSES
            .iter()
            .enumerate()
            .map(|(n, &class)| Report {
                class,
                message: format!("é{n}"),
                kernel: "k".repeat(n),
                source: (n % 2 == 0).then(|| format!("a.cu:{n}")),
                instruction: String::new(),
                thread: (n % 3 == 0).then_some(([n as u32; 3], [7, 8, u32::MAX])),
            })
            .collect();
        let bytes = report_bytes(&all);
        assert_eq!(reports(&bytes), Some(all));
        assert_eq!(reports(&bytes[..bytes.len() - 1]), None);
    }
}
