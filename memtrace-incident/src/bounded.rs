//! A deserializer around another one that bounds what is made of its input while it is parsed,
//! whatever the types are: every object, list entry and string is paid for from one budget, and a
//! string longer than [`caps::TEXT`] loses its middle. It also knows in which field parsing ended,
//! for the message.
//!
//! The caps of single lists ([`crate::capped`]) do not bound their product (paths times frames
//! times strings), and a new field could be without one. The budget bounds them all.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor,
};

use crate::caps;

/// Bytes that an object is charged: about the size of the largest type of which there may be many.
const OBJECT: u64 = 128;
/// Bytes that a list entry is charged beside what is in it.
const ENTRY: u64 = 16;
/// Bytes that a string is charged beside its text: what an allocation takes at least.
const STRING: u64 = 32;
/// Steps of a path that are kept. The parser of JSON refuses deeper nesting by itself.
const MAX_DEPTH: usize = 128;
/// Bytes of a key that are kept for the message.
const MAX_KEY: usize = 40;
/// Put in place of the middle of a long string.
const MARK: &str = "…";

/// What is left of the budget, and where parsing is.
#[derive(Debug)]
pub(crate) struct Bounds {
    left: Cell<u64>,
    /// Keys and positions from the outermost object inwards. Cap: [`MAX_DEPTH`].
    path: RefCell<Vec<Step>>,
}

#[derive(Debug)]
enum Step {
    Key(String),
    Entry(usize),
}

impl Bounds {
    /// A budget of `bytes`.
    pub(crate) fn new(bytes: u64) -> Self {
        Self { left: Cell::new(bytes), path: RefCell::default() }
    }

    /// Deserializes a value within the budget.
    pub(crate) fn parse<'de, T: Deserialize<'de>, D: Deserializer<'de>>(&self, input: D) -> Result<T, D::Error> {
        T::deserialize(Bounded { inner: input, bounds: self, part: Part::Value })
    }

    /// Where parsing ended with an error, as `oom.victims[3].comm`; empty at the top.
    pub(crate) fn field(&self) -> String {
        let mut out = String::new();
        for step in self.path.borrow().iter() {
            match step {
                Step::Key(key) if out.is_empty() => out.push_str(key),
                Step::Key(key) => out.extend([".", key]),
                Step::Entry(at) => out.push_str(&format!("[{at}]")),
            }
        }
        out
    }

    fn charge<E: Error>(&self, bytes: u64) -> Result<(), E> {
        match self.left.get().checked_sub(bytes) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => Err(E::custom("the file holds more than memtrace reads of one")),
        }
    }

    fn push(&self, step: Step) {
        let mut path = self.path.borrow_mut();
        if path.len() < MAX_DEPTH {
            path.push(step);
        }
    }

    fn pop(&self) {
        self.path.borrow_mut().pop();
    }

    /// The next key of the object that parsing is in.
    fn key(&self, key: &str) {
        let printable = key.chars().filter(|c| c.is_ascii_graphic()).take(MAX_KEY).collect();
        if let Some(last) = self.path.borrow_mut().last_mut() {
            *last = Step::Key(printable);
        }
    }

    fn next_entry(&self, at: usize) {
        if let Some(last) = self.path.borrow_mut().last_mut() {
            *last = Step::Entry(at);
        }
    }
}

/// `text` with its middle left out; `None` if it is no longer than [`caps::TEXT`] bytes.
pub fn shorten(text: &str) -> Option<String> {
    if text.len() <= caps::TEXT {
        return None;
    }
    let half = (caps::TEXT - MARK.len()) / 2;
    let head = text.get(..text.floor_char_boundary(half)).unwrap_or_default();
    let tail = text.get(text.ceil_char_boundary(text.len().saturating_sub(half))..).unwrap_or_default();
    Some([head, MARK, tail].concat())
}

/// Bytes that a report may need to print the text: some characters become an escape of six bytes.
fn printed(text: &str) -> u64 {
    text.bytes().fold(0, |sum: u64, byte| {
        sum.saturating_add(match byte {
            b'<' | b'>' | b'&' | 0x7f | ..0x20 => 6,
            // Two to four bytes of a character become six, six or twelve.
            0x80.. => 3,
            _ => 1,
        })
    })
}

/// A deserializer, visitor, seed or access of serde, bounded.
#[derive(Clone, Copy)]
struct Bounded<'b, T> {
    inner: T,
    bounds: &'b Bounds,
    part: Part,
}

/// What a string is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Value,
    /// The key of an object, which is noted.
    Key,
    /// The key of an object whose keys are fields of a type: noted, and not kept in memory.
    Field,
}

impl<'b, T> Bounded<'b, T> {
    fn wrap<U>(&self, inner: U) -> Bounded<'b, U> {
        Bounded { inner, bounds: self.bounds, part: self.part }
    }
}

macro_rules! forward {
    ($($method:ident($($name:ident: $type:ty),*);)*) => {
        $(
            fn $method<V: Visitor<'de>>(self, $($name: $type,)* visitor: V) -> Result<V::Value, D::Error> {
                let visitor = self.wrap(visitor);
                self.inner.$method($($name,)* visitor)
            }
        )*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Bounded<'_, D> {
    type Error = D::Error;

    forward! {
        deserialize_any();
        deserialize_bool();
        deserialize_i8();
        deserialize_i16();
        deserialize_i32();
        deserialize_i64();
        deserialize_u8();
        deserialize_u16();
        deserialize_u32();
        deserialize_u64();
        deserialize_f32();
        deserialize_f64();
        deserialize_char();
        deserialize_str();
        deserialize_string();
        deserialize_bytes();
        deserialize_byte_buf();
        deserialize_option();
        deserialize_unit();
        deserialize_unit_struct(name: &'static str);
        deserialize_newtype_struct(name: &'static str);
        deserialize_seq();
        deserialize_tuple(len: usize);
        deserialize_tuple_struct(name: &'static str, len: usize);
        deserialize_map();
        deserialize_struct(name: &'static str, fields: &'static [&'static str]);
        deserialize_enum(name: &'static str, variants: &'static [&'static str]);
        deserialize_ignored_any();
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let part = if self.part == Part::Key { Part::Field } else { self.part };
        self.inner.deserialize_identifier(Bounded { inner: visitor, bounds: self.bounds, part })
    }
}

macro_rules! scalar {
    ($($method:ident: $type:ty;)*) => {
        $(
            fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
                self.inner.$method(value)
            }
        )*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Bounded<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    scalar! {
        visit_bool: bool;
        visit_i64: i64;
        visit_u64: u64;
        visit_f64: f64;
        visit_char: char;
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<V::Value, E> {
        let shortened = shorten(text);
        let text = shortened.as_deref().unwrap_or(text);
        if self.part != Part::Value {
            self.bounds.key(text);
        }
        if self.part != Part::Field {
            self.bounds.charge(STRING.saturating_add(printed(text)))?;
        }
        self.inner.visit_str(text)
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<V::Value, E> {
        self.bounds.charge(STRING.saturating_add(bytes.len() as u64))?;
        self.inner.visit_bytes(bytes)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, input: D) -> Result<V::Value, D::Error> {
        let input = self.wrap(input);
        self.inner.visit_some(input)
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, input: D) -> Result<V::Value, D::Error> {
        let input = self.wrap(input);
        self.inner.visit_newtype_struct(input)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<V::Value, A::Error> {
        self.bounds.push(Step::Entry(0));
        let value = self.inner.visit_seq(List { inner: list, bounds: self.bounds, at: 0 })?;
        self.bounds.pop();
        Ok(value)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.bounds.charge(OBJECT)?;
        self.bounds.push(Step::Key(String::new()));
        let value = self.inner.visit_map(Bounded { inner: map, bounds: self.bounds, part: Part::Value })?;
        self.bounds.pop();
        Ok(value)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, choice: A) -> Result<V::Value, A::Error> {
        let choice = self.wrap(choice);
        self.inner.visit_enum(choice)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Bounded<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<S::Value, D::Error> {
        let input = self.wrap(input);
        self.inner.deserialize(input)
    }
}

/// The entries of a list.
struct List<'b, A> {
    inner: A,
    bounds: &'b Bounds,
    at: usize,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for List<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.bounds.next_entry(self.at);
        self.at = self.at.saturating_add(1);
        let entry = self.inner.next_element_seed(Bounded { inner: seed, bounds: self.bounds, part: Part::Value })?;
        if entry.is_some() {
            self.bounds.charge(ENTRY)?;
        }
        Ok(entry)
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Bounded<'_, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.inner.next_key_seed(Bounded { inner: seed, bounds: self.bounds, part: Part::Key })
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.wrap(seed);
        self.inner.next_value_seed(seed)
    }
}

impl<'de, 'b, A: EnumAccess<'de>> EnumAccess<'de> for Bounded<'b, A> {
    type Error = A::Error;
    type Variant = Bounded<'b, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let seed = self.wrap(seed);
        let (bounds, part) = (self.bounds, self.part);
        let (value, inner) = self.inner.variant_seed(seed)?;
        Ok((value, Bounded { inner, bounds, part }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Bounded<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.wrap(seed);
        self.inner.newtype_variant_seed(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = self.wrap(visitor);
        self.inner.tuple_variant(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = self.wrap(visitor);
        self.inner.struct_variant(fields, visitor)
    }
}
