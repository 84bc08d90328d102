//! Deserializers for lists with a cap ([`crate::caps`]). The first entry above the cap ends the
//! parse, so a hostile file cannot make a reader allocate more than the caps allow.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

use crate::{AllocationPath, caps};

/// Entries to allocate ahead at most. The length that a file claims is not trusted.
const FIRST_ROOM: usize = 64;

macro_rules! capped {
    ($($field:ident: $most:expr),* $(,)?) => {
        $(
            pub(crate) fn $field<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
            where
                T: Deserialize<'de>,
                D: Deserializer<'de>,
            {
                list(deserializer, stringify!($field), $most)
            }
        )*
    };
}

capped! {
    growth: caps::GROWTH,
    mappings: caps::MAPPINGS,
    frames: caps::FRAMES,
    losses: caps::LOSSES,
    functions: caps::FUNCTIONS,
    victims: caps::VICTIMS,
    tasks: caps::TASKS,
    command: caps::COMMAND,
    processes: caps::PROCESSES,
    oom_incidents: caps::OOM_INCIDENTS,
    rows: caps::ROWS,
    evidence: caps::EVIDENCE,
    reasons: caps::REASONS,
    samples: caps::SAMPLES,
}

/// Paths, with a cap on their frames together beside that of each list.
pub(crate) fn allocation_paths<'de, D>(deserializer: D) -> Result<Vec<AllocationPath>, D::Error>
where
    D: Deserializer<'de>,
{
    let weight = |path: &AllocationPath| path.frames.len();
    let all = Some(All { weight, most: caps::ALL_FRAMES, name: "frames in all" });
    deserializer.deserialize_seq(Capped { name: "allocation_paths", most: caps::ALLOCATION_PATHS, all })
}

fn list<'de, T, D>(deserializer: D, name: &'static str, most: usize) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_seq(Capped { name, most, all: None })
}

struct Capped<T> {
    name: &'static str,
    most: usize,
    all: Option<All<T>>,
}

/// A cap on what the entries of a list hold together.
struct All<T> {
    weight: fn(&T) -> usize,
    most: usize,
    name: &'static str,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Capped<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} {}", self.most, self.name)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut entries = Vec::with_capacity(list.size_hint().unwrap_or(0).min(FIRST_ROOM));
        let mut weight = 0usize;
        while let Some(entry) = list.next_element()? {
            if entries.len() >= self.most {
                return Err(A::Error::custom(format!("more than {} {}", self.most, self.name)));
            }
            if let Some(all) = &self.all {
                weight = weight.saturating_add((all.weight)(&entry));
                if weight > all.most {
                    return Err(A::Error::custom(format!("more than {} {}", all.most, all.name)));
                }
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}
