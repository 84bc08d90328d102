//! Deserializers for lists with a cap ([`crate::caps`]). The first entry above the cap ends the
//! parse, so a hostile file cannot make a reader allocate more than the caps allow.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

use crate::caps;

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
    allocation_paths: caps::ALLOCATION_PATHS,
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

fn list<'de, T, D>(deserializer: D, name: &'static str, most: usize) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_seq(Capped { name, most, entry: PhantomData })
}

struct Capped<T> {
    name: &'static str,
    most: usize,
    entry: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Capped<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} {}", self.most, self.name)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut entries = Vec::with_capacity(list.size_hint().unwrap_or(0).min(FIRST_ROOM));
        while let Some(entry) = list.next_element()? {
            if entries.len() >= self.most {
                return Err(A::Error::custom(format!("more than {} {}", self.most, self.name)));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}
