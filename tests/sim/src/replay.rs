//! The same inputs again, in one piece or in several: what a journal promises.

use std::collections::BTreeMap;

use crate::adapter::{Fact, Fault, Kind, Out, Step, Subject, journalled};
use crate::distort::Lost;
use crate::invariants::{Saved, Violation, Witness, hold};
use crate::model::World;

/// What an engine said, as a number: FNV-1a over its bytes.
pub(crate) fn hash(outs: &[Out]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in outs.iter().flat_map(|out| out.text().into_bytes().into_iter().chain([0])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}

/// Feeds inputs to an engine; what it said to each, by number of the input.
fn replay<'a>(subject: &mut Subject, steps: impl Iterator<Item = (usize, &'a Step)>) -> Vec<(usize, Vec<Out>)> {
    let mut said = Vec::new();
    for (n, step) in steps {
        let outs = journalled(step).map(|step| subject.apply(&step)).unwrap_or_default();
        if !outs.is_empty() {
            said.push((n, outs));
        }
    }
    said
}

fn compare(invariant: &'static str, first: &[(usize, u64)], again: &[(usize, Vec<Out>)]) -> Result<(), Violation> {
    let hashes: Vec<(usize, u64)> = again.iter().map(|(n, outs)| (*n, hash(outs))).collect();
    let differs = first.iter().zip(&hashes).find(|(a, b)| a != b).map(|(a, b)| (a.0, b.0));
    hold(invariant, first == hashes.as_slice(), || {
        let (a, b) = (first.len(), hashes.len());
        format!("{a} inputs were answered at first, {b} then; the first that differ: {differs:?}")
    })
}

/// A second engine says the same, byte for byte.
pub(crate) fn same(steps: &[Step], said: &[(usize, u64)], fault: Fault) -> Result<(), Violation> {
    let again = replay(&mut Subject::new(fault), steps.iter().enumerate());
    compare("a replay is the same", said, &again)
}

/// The moment a run is cut at.
#[derive(Debug)]
pub(crate) struct Cut {
    /// Inputs before it.
    pub(crate) at: usize,
    pub(crate) preamble: Vec<Fact>,
    /// The engine, as it was then.
    pub(crate) subject: Subject,
}

impl Cut {
    /// A stop here closes everything.
    pub(crate) fn stop(&self, now: u64, witness: &Witness, world: &World, lost: &Lost) -> Result<(), Violation> {
        let (mut subject, mut witness) = (self.subject.clone(), witness.clone());
        for out in subject.apply(&Step::Fact(Fact::Stop { boot_ns: now })) {
            witness.see(&out, world, lost)?;
        }
        let counts = subject.counts();
        let open = (counts.open_incidents, counts.stuck_cgroups);
        hold("a stop in the middle closes everything", open == (0, 0), || format!("{counts:?}"))?;
        witness.stopped()
    }

    /// What the engine says of itself it knows already.
    pub(crate) fn preamble_changes_nothing(&self, steps: &[Step], said: &[(usize, u64)]) -> Result<(), Violation> {
        let mut subject = self.subject.clone();
        for fact in &self.preamble {
            let outs = subject.apply(&Step::Fact(fact.clone()));
            hold("a preamble says nothing new", outs.is_empty(), || format!("{outs:?} to {fact:?}"))?;
        }
        let again = replay(&mut subject, steps.iter().enumerate().skip(self.at));
        let rest: Vec<(usize, u64)> = said.iter().filter(|(n, _)| *n >= self.at).copied().collect();
        compare("a preamble changes nothing", &rest, &again)
    }

    /// A fresh engine with the preamble and the rest agrees about every kill of the rest.
    pub(crate) fn rest_alone(
        &self,
        steps: &[Step],
        witness: &Witness,
        world: &World,
        first: &BTreeMap<usize, usize>,
        fault: Fault,
    ) -> Result<(), Violation> {
        let mut subject = Subject::new(fault);
        let facts: Vec<Step> = self.preamble.iter().cloned().map(Step::Fact).collect();
        replay(&mut subject, facts.iter().map(|fact| (0, fact)));
        let again = replay(&mut subject, steps.iter().enumerate().skip(self.at));
        let saves = again.iter().flat_map(|(_, outs)| outs).filter_map(|out| match out {
            Out::Save(incident) => Some(Saved::of(incident)),
            _ => None,
        });
        let by_id: BTreeMap<String, Saved> = saves.map(|saved| (saved.id.clone(), saved)).collect();
        let later = |decision: &usize| first.get(decision).is_some_and(|n| *n >= self.at);
        let after = |saved: &&Saved| {
            let truths = saved.victims.iter().map(|v| world.victims.get(&v.key));
            saved.kind == Kind::OomKill && truths.into_iter().flatten().all(|t| t.decisions.iter().all(later))
        };
        for saved in witness.saved.iter().filter(after) {
            let other = by_id.get(&saved.id);
            let alike = other.is_some_and(|other| other.kind == saved.kind && other.victims == saved.victims);
            hold("a segment alone tells of its kills", alike, || format!("{saved:?}\n  became {other:?}"))?;
        }
        Ok(())
    }
}
