//! Questions to a machine that lends disks, and a passphrase for one that waits for it.

use zeroize::Zeroizing;

use super::*;
use crate::unlock::{Outcome, Passphrase, Unlocking};

const LIST: &[u8] = br#"{"ask":"list"}"#;
const NONE: &[u8] = br#"{"loan":"disks","disks":[]}"#;

#[test]
fn a_question_and_its_answer_are_the_pinned_ones() {
    let (_, _, accepted, opened) = pinned();
    let (body, receiver) = opened.ask(LIST).unwrap();
    assert_eq!(body, vector("ask_list"));
    let (mut sender, question) = accepted.begin_asking(&body).unwrap();
    assert_eq!(*question, LIST);
    let answer = sender.loan(NONE).unwrap();
    assert_eq!(answer, vector("loan_none"));
    assert_eq!(*receiver.loan(&answer).unwrap(), NONE);
}

#[test]
fn any_flipped_bit_of_question_or_answer_is_noticed() {
    let body = vector("ask_list");
    for bit in 0..body.len() * 8 {
        let mut altered = body.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        let (_, _, accepted, _) = pinned();
        assert!(accepted.begin_asking(&altered).is_err(), "bit {bit}");
    }
    let answer = vector("loan_none");
    for bit in 0..answer.len() * 8 {
        let mut altered = answer.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        let (_, _, _, opened) = pinned();
        assert!(opened.ask(LIST).unwrap().1.loan(&altered).is_err(), "bit {bit}");
    }
}

#[test]
fn a_question_or_answer_cut_anywhere_is_refused() {
    let body = vector("ask_list");
    for length in 0..body.len() {
        let (_, _, accepted, _) = pinned();
        assert!(accepted.begin_asking(&body[..length]).is_err(), "{length}");
    }
    let answer = vector("loan_none");
    for length in 0..answer.len() {
        let (_, _, _, opened) = pinned();
        let cut = opened.ask(LIST).unwrap().1.loan(&answer[..length]);
        assert!(cut.is_err(), "{length}");
    }
    let (_, _, _, opened) = pinned();
    assert!(opened.ask(LIST).unwrap().1.loan(&[answer, vec![0]].concat()).is_err());
}

#[test]
fn a_refusal_is_told_and_a_bundle_is_no_loan() {
    let (_, _, accepted, opened) = pinned();
    let (body, receiver) = opened.ask(LIST).unwrap();
    let (mut sender, _) = accepted.begin_asking(&body).unwrap();
    let refusal = sender.refusal("no").unwrap();
    assert!(matches!(receiver.loan(&refusal), Err(StreamError::Refused { reason }) if reason == "no"));
    let (_, _, accepted, opened) = pinned();
    let (body, receiver) = opened.ask(LIST).unwrap();
    let (mut sender, _) = accepted.begin_asking(&body).unwrap();
    let manifest = sender.manifest(&small()).unwrap();
    assert!(matches!(receiver.loan(&manifest), Err(StreamError::Order { .. })));
}

#[test]
fn a_question_that_only_begins_a_boot_is_none() {
    let (_, _, accepted, opened) = pinned();
    assert!(accepted.begin_asking(&opened.begin).is_err());
}

#[test]
fn a_passphrase_and_its_answer_are_the_pinned_ones() {
    let (_, _, accepted, opened) = pinned();
    let typed = Passphrase::new(Zeroizing::new("pässt".as_bytes().to_vec())).unwrap();
    let (body, receiver) = opened.ask(&typed.to_request()).unwrap();
    assert_eq!(body, vector("unlock"));
    let (mut sender, request) = accepted.begin_asking(&body).unwrap();
    assert_eq!(Passphrase::parse(&request), Ok(typed));
    let wrong = Unlocking::new(Outcome::Wrong, 0, "sda2");
    let answer = sender.unlocking(&wrong).unwrap();
    assert_eq!(answer, vector("unlock_wrong"));
    assert_eq!(receiver.unlocking(&answer).unwrap(), wrong);
}

#[test]
fn an_answer_about_a_passphrase_that_was_altered_or_cut_is_refused() {
    let answer = vector("unlock_wrong");
    let receiver = || {
        let (_, _, _, opened) = pinned();
        opened.ask(LIST).unwrap().1
    };
    for bit in 0..answer.len() * 8 {
        let mut altered = answer.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        assert!(receiver().unlocking(&altered).is_err(), "bit {bit}");
    }
    for length in 0..answer.len() {
        assert!(receiver().unlocking(&answer[..length]).is_err(), "{length}");
    }
    assert!(receiver().loan(&answer).is_err(), "it is no loan");
}
