//! The configuration's values: each is written as one plain text, some also as a list.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use crate::handover::DiskTransport;

/// `auto`, or a value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Auto<T> {
    /// Found out when it is needed.
    #[default]
    Auto,
    /// As configured.
    Given(T),
}

impl<T> Auto<T> {
    /// The value, if one was given.
    pub const fn given(&self) -> Option<&T> {
        match self {
            Self::Auto => None,
            Self::Given(value) => Some(value),
        }
    }
}

impl<'de, T: Deserialize<'de> + FromPlain> Deserialize<'de> for Auto<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct AutoVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de> + FromPlain> Visitor<'de> for AutoVisitor<T> {
            type Value = Auto<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "`auto` or {}", T::ACCEPTED)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text == "auto" {
                    return Ok(Auto::Auto);
                }
                T::from_plain(text)
                    .map(Auto::Given)
                    .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                T::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Auto::Given)
            }
        }
        from.deserialize_any(AutoVisitor(std::marker::PhantomData))
    }
}

/// A value that can be written as one plain text.
pub trait FromPlain: Sized {
    /// What is accepted, in words.
    const ACCEPTED: &'static str;
    /// Reads it.
    ///
    /// # Errors
    /// A sentence.
    fn from_plain(text: &str) -> Result<Self, String>;
}

impl FromPlain for DiskTransport {
    const ACCEPTED: &'static str = "nvme-tcp or nbd";
    fn from_plain(text: &str) -> Result<Self, String> {
        match text {
            "nvme-tcp" => Ok(Self::NvmeTcp),
            "nbd" => Ok(Self::Nbd),
            _ => Err("neither".to_owned()),
        }
    }
}

impl FromPlain for PathBuf {
    const ACCEPTED: &'static str = "an absolute path";
    fn from_plain(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            Ok(Self::from(text))
        } else {
            Err("not absolute".to_owned())
        }
    }
}

/// One value, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<T: FromPlain> FromPlain for OneOrMany<T> {
    const ACCEPTED: &'static str = "one absolute path or a list of them";
    fn from_plain(text: &str) -> Result<Self, String> {
        T::from_plain(text).map(|one| Self(vec![one]))
    }
}

impl<'de, T: FromPlain> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Vec::<String>::deserialize(from)?
            .iter()
            .map(|text| {
                T::from_plain(text).map_err(|_| de::Error::invalid_value(de::Unexpected::Str(text), &T::ACCEPTED))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// Words of a kernel command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Words(pub Vec<String>);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}

impl FromPlain for Words {
    const ACCEPTED: &'static str = "one line of text or a list of words";
    fn from_plain(text: &str) -> Result<Self, String> {
        if text.chars().any(|c| c.is_control()) {
            return Err("control characters".to_owned());
        }
        // A quoted word may hold spaces (as the kernel reads it), so the text stays whole.
        Ok(Self(if text.trim().is_empty() {
            Vec::new()
        } else {
            vec![text.trim().to_owned()]
        }))
    }
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct WordsVisitor;
        impl<'de> Visitor<'de> for WordsVisitor {
            type Value = Words;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Words::ACCEPTED)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Words, E> {
                Words::from_plain(text).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some(text) = seq.next_element::<String>()? {
                    words.extend(
                        Words::from_plain(&text)
                            .map_err(|_| de::Error::invalid_value(de::Unexpected::Str(&text), &self))?
                            .0,
                    );
                }
                Ok(Words(words))
            }
        }
        from.deserialize_any(WordsVisitor)
    }
}

/// Makes a type readable from one plain text, with what it accepts in the error.
macro_rules! plain {
    ($type:ty) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                <$type>::from_plain(&text)
                    .map_err(|_| de::Error::invalid_value(de::Unexpected::Str(&text), &<$type>::ACCEPTED))
            }
        }
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                <$type>::from_plain(text)
                    .map_err(|_| format!("`{text}` is not understood; accepted: {}", <$type>::ACCEPTED))
            }
        }
    };
}

/// A NIC's hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl FromPlain for Mac {
    const ACCEPTED: &'static str = "a hardware address such as 00:e0:4c:68:01:02";
    fn from_plain(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or("six parts")?;
            *byte = u8::from_str_radix(part, 16).map_err(|error| error.to_string())?;
        }
        if parts.next().is_some() {
            Err("six parts".to_owned())
        } else {
            Ok(Self(bytes))
        }
    }
}
plain!(Mac);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// A USB device: vendor, product and, where one of several alike is meant, its serial number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UsbId {
    /// idVendor.
    pub vendor: u16,
    /// idProduct.
    pub product: u16,
    /// iSerialNumber's text.
    pub serial: Option<String>,
}

impl FromPlain for UsbId {
    const ACCEPTED: &'static str = "a USB identity such as 0bda:8153 or 0bda:8153:SERIAL";
    fn from_plain(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(3, ':');
        let mut number = || -> Result<u16, String> {
            let part = parts.next().filter(|part| part.len() == 4).ok_or("four digits")?;
            u16::from_str_radix(part, 16).map_err(|error| error.to_string())
        };
        let (vendor, product) = (number()?, number()?);
        let serial = parts.next().map(str::to_owned);
        if serial.as_deref() == Some("") {
            return Err("empty serial".to_owned());
        }
        Ok(Self {
            vendor,
            product,
            serial,
        })
    }
}
plain!(UsbId);

impl fmt::Display for UsbId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.product)?;
        self.serial.iter().try_for_each(|serial| write!(f, ":{serial}"))
    }
}

/// A time in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seconds(pub Duration);

impl FromPlain for Seconds {
    const ACCEPTED: &'static str = "a time such as 0s, 30s, 15min or 1h (at most 24h)";
    fn from_plain(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let number: u64 = digits.parse().map_err(|_| "digits")?;
        let unit = match &text[digits.len()..] {
            "s" => 1,
            "min" => 60,
            "h" => 3600,
            "" if number == 0 => 1,
            _ => return Err("unit".to_owned()),
        };
        match number.checked_mul(unit) {
            Some(seconds) if seconds <= 24 * 3600 => Ok(Self(Duration::from_secs(seconds))),
            _ => Err("too long".to_owned()),
        }
    }
}
plain!(Seconds);

/// Per cent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Percent(pub u8);

impl FromPlain for Percent {
    const ACCEPTED: &'static str = "per cent, such as 10%";
    fn from_plain(text: &str) -> Result<Self, String> {
        let number: u8 = text.trim_end_matches('%').parse().map_err(|_| "digits")?;
        if number <= 100 {
            Ok(Self(number))
        } else {
            Err("over 100".to_owned())
        }
    }
}
plain!(Percent);
